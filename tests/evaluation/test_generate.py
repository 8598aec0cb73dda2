"""Generation against the sampler called by hand, its independence of batches, and the folder that resumes."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers_tiny import make_tiny_folder

from diffusion_align.data.images import ImageError
from diffusion_align.evaluation import Drawing, evaluation_table, generate, read_picture, read_pictures, save_pictures
from diffusion_align.evaluation.picture_folder import missing_pictures, picture_path
from diffusion_align.models import load_pipeline
from diffusion_align.models.analytic import gaussian_denoiser
from diffusion_align.rng import normal
from diffusion_align.samplers import sample, step_table
from diffusion_align.schedule import Schedule

SCHEDULE = Schedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
SHAPE = (3, 8, 8)
PROMPTS = [f"prompt {i}" for i in range(7)]


class FakeModel:
    """Data N(length of the prompt / 20, 0.1^2) whose latents are the picture itself; records what it is asked."""

    device = torch.device("cpu")

    def __init__(self, shift=0.0, name="fake"):
        self.shift, self.name, self.encoded, self.guidance = shift, name, [], []

    def encode_text(self, prompts):
        self.encoded += prompts
        return torch.tensor([[[len(p) / 20 + self.shift]] for p in prompts])

    def denoiser(self, text, guidance=1.0):
        self.guidance.append(guidance)
        return gaussian_denoiser(SCHEDULE, text[:, :, :, None].expand(-1, *SHAPE), torch.tensor(0.1))

    def latent_shape(self, resolution=None):
        return SHAPE

    def decode(self, latents):
        return latents.clamp(0, 1)

    def fingerprint(self):
        return self.name


ODE = evaluation_table(SCHEDULE, 6)
SDE = step_table(SCHEDULE, 6, eta=1.0)


def pictures(model, batch_size, table=ODE, prompts=PROMPTS, seed=5, numbers=None, per_prompt=1):
    drawing = Drawing(table, guidance=2.0, seed=seed, batch_size=batch_size, per_prompt=per_prompt)
    found = {}
    for part, images in generate(model, prompts, drawing, numbers=numbers):
        found |= dict(zip(part, images, strict=True))
    return found


def test_the_evaluation_sampler_is_the_pinned_one():
    names = ("timesteps", "cx", "c", "std")
    pinned = step_table(SCHEDULE, 20, solver="dpmpp", order=2, eta=0.0, spacing="trailing", final="zero")
    table = evaluation_table(SCHEDULE, 20)
    assert all(torch.equal(getattr(table, name), getattr(pinned, name)) for name in names)
    assert not table.stochastic.any() and table.sigma[-1] == 0 and table.order.max() == 2 and table.timesteps[0] == 999


def test_a_picture_comes_from_the_noise_at_its_address():
    model = FakeModel()
    found = pictures(model, 3)
    for i in (0, 4):
        x_T = normal(SHAPE, 5, "evaluation", i)[None]
        expected = model.decode(sample(model.denoiser(model.encode_text([PROMPTS[i]])), ODE, x_T))[0]
        torch.testing.assert_close(found[i], expected, atol=1e-6, rtol=0)
    assert model.guidance[:3] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("table", [ODE, SDE], ids=["ode", "sde"])
def test_the_batch_size_does_not_change_a_picture(table):
    alone = pictures(FakeModel(), 1, table)
    for batch_size in (2, 3, 7, 100):
        other = pictures(FakeModel(), batch_size, table)
        assert other.keys() == alone.keys()
        assert all(torch.equal(other[i], alone[i]) for i in alone)
    some = pictures(FakeModel(), 2, table, numbers=[6, 1, 3])
    assert list(some) == [6, 1, 3] and all(torch.equal(some[i], alone[i]) for i in some)


def test_noise_differs_between_prompts_and_seeds_and_is_shared_between_models():
    same = ["one prompt"] * 3
    found = pictures(FakeModel(), 3, SDE, same)
    assert not torch.equal(found[0], found[1]) and not torch.equal(
        found[0], pictures(FakeModel(), 3, SDE, same, seed=6)[0]
    )
    base, tuned = pictures(FakeModel(), 3, ODE, same), pictures(FakeModel(shift=0.1), 3, ODE, same)
    for i in range(3):
        # For Gaussian data the noise moves the sample around its mean: the same noise, the same place around it.
        inside = (base[i] > 0) & (tuned[i] < 1)
        torch.testing.assert_close((tuned[i] - base[i])[inside].mean(), torch.tensor(0.1), atol=1e-3, rtol=0)


def test_every_prompt_is_encoded_once():
    model = FakeModel()
    pictures(model, 3)
    assert model.encoded == PROMPTS


def test_generation_leaves_gradients_on_for_the_caller():
    batches = generate(FakeModel(), PROMPTS, Drawing(ODE, guidance=1.0, seed=0, batch_size=2))
    _, images = next(batches)
    assert torch.is_grad_enabled() and not images.requires_grad


def test_bad_batch_size_and_diverged_models_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        pictures(FakeModel(), 0)
    model = FakeModel()
    model.decode = lambda latents: torch.where(latents.mean((1, 2, 3), keepdim=True) > 0.44, math.nan, latents)
    with pytest.raises(ValueError, match="prompt 3 is not finite"):
        pictures(model, 2, prompts=[*PROMPTS[:3], "a longer one"])


@pytest.mark.parametrize("table", [ODE, SDE], ids=["ode", "sde"])
def test_more_pictures_of_a_prompt_do_not_change_the_first(table):
    one, three = pictures(FakeModel(), 3, table), pictures(FakeModel(), 4, table, per_prompt=3)
    assert sorted(three) == list(range(21))
    assert all(torch.equal(three[3 * i], one[i]) for i in range(7))
    distinct = {tuple(image.flatten().tolist()) for image in three.values()}
    assert len(distinct) == 21
    noise = normal(SHAPE, 5, "evaluation", 4, 2)[None]
    model = FakeModel()
    expected = model.decode(sample(model.denoiser(model.encode_text([PROMPTS[4]])), ODE, noise))[0]
    if table is ODE:
        torch.testing.assert_close(three[14], expected, atol=1e-6, rtol=0)


def save(model, folder, prompts=PROMPTS, seed=5, table=ODE, guidance=2.0, per_prompt=1, **more):
    drawing = Drawing(table, guidance, seed, batch_size=3, per_prompt=per_prompt)
    return list(save_pictures(model, prompts, folder, drawing, **more))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_has_genevals_layout(tmp_path):
    """00000/metadata.jsonl with the prompt and its tags, 00000/samples/0000.png and on."""
    extras = [{"tag": "count", "include": [{"class": "circle", "count": i}]} for i in range(2)]
    save(FakeModel(), tmp_path, prompts=PROMPTS[:2], per_prompt=2, extras=extras)
    one = ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    assert sorted(contents(tmp_path)) == sorted(
        [*(f"0000{i}/{name}" for i in range(2) for name in one), "pictures.json"]
    )
    lines = (tmp_path / "00001" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{**extras[1], "prompt": PROMPTS[1]}]


@pytest.mark.parametrize("count", [2, 3, 9])
def test_shards_fill_one_folder_completely(tmp_path, count):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    save(FakeModel(), whole, per_prompt=2)
    drawn = [
        number
        for i in range(count)
        for part in save(FakeModel(), parts, per_prompt=2, shard=(i, count))
        for number in part
    ]
    assert sorted(drawn) == list(range(14)) and contents(parts) == contents(whole)
    assert save(FakeModel(), parts, per_prompt=2) == [] and missing_pictures(parts, 14, 2) == []
    (parts / "00003" / "samples" / "0001.png").write_bytes(b"cut")
    assert missing_pictures(parts, 14, 2) == [7]
    assert save(FakeModel(), parts, per_prompt=2, shard=(3 % count, count)) == [[7]] and contents(parts) == contents(
        whole
    )
    with pytest.raises(ValueError, match="shards are counted from 0"):
        save(FakeModel(), parts, shard=(2, 2))


def test_saved_pictures_are_rounded_to_eight_bits(tmp_path):
    assert save(FakeModel(), tmp_path / "new") == [[0, 1, 2], [3, 4, 5], [6]]
    direct = pictures(FakeModel(), 3)
    back = {
        i: image
        for part, images in read_pictures(tmp_path / "new", 7, 4)
        for i, image in zip(part, images, strict=True)
    }
    assert list(back) == list(range(7))
    assert all(torch.equal(back[i], (direct[i].double() * 255).round().float() / 255) for i in back)


def test_an_interrupted_folder_is_completed(tmp_path):
    save(FakeModel(), tmp_path)
    whole, (gone, kept_file, cut, empty) = contents(tmp_path), (picture_path(tmp_path, i) for i in (2, 3, 4, 5))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:60])
    empty.write_bytes(b"")
    kept = kept_file.stat().st_mtime_ns
    model = FakeModel()
    assert save(model, tmp_path) == [[2, 4, 5]]
    assert model.encoded == ["prompt 2", "prompt 4", "prompt 5"]
    assert contents(tmp_path) == whole and kept_file.stat().st_mtime_ns == kept
    assert save(model, tmp_path) == []


def test_a_killed_write_leaves_no_unfinished_picture(tmp_path, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        sys.modules["diffusion_align.evaluation.picture_folder"],
        "os",
        SimpleNamespace(replace=killed, getpid=lambda: 1),
    )
    with pytest.raises(KeyboardInterrupt):
        save(FakeModel(), tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("0*.png")) and save(FakeModel(), tmp_path)[0] == [0, 1, 2]


def test_a_folder_of_other_pictures_is_refused(tmp_path):
    save(FakeModel(), tmp_path, facts={"adapter": "run 1"})
    facts = {"adapter": "run 1"}
    for change, match in [
        ({"seed": 6}, "another seed"),
        ({"guidance": 3.0}, "another guidance"),
        ({"table": SDE}, "another sampler"),
        ({"model": FakeModel(name="tuned")}, "another model"),
        ({"facts": {"adapter": "run 2"}}, "another adapter"),
        ({"facts": None}, "another adapter"),
        ({"per_prompt": 2}, "another per_prompt"),
        ({"prompts": ["prompt 0", "changed"]}, r"other prompts \(number 1\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            save(**{"model": FakeModel(), "folder": tmp_path, "facts": facts, **change})
    assert save(FakeModel(), tmp_path, prompts=PROMPTS[:2], facts=facts) == []
    assert save(FakeModel(), tmp_path, prompts=[*PROMPTS, "one more"], facts=facts) == [[7]]
    assert json.loads((tmp_path / "pictures.json").read_text())["prompts"] == [*PROMPTS, "one more"]


def test_hostile_prompts_do_not_name_files(tmp_path):
    prompts = ["../../escape", "a/b\x00c", "$(touch owned)", "\ud800 lone", "x" * 1_000_000]
    save(FakeModel(), tmp_path / "in", prompts=prompts)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert json.loads((tmp_path / "in" / "pictures.json").read_text())["prompts"] == prompts
    assert save(FakeModel(), tmp_path / "in", prompts=prompts) == []


def test_a_broken_or_missing_picture_is_named(tmp_path):
    save(FakeModel(), tmp_path)
    picture_path(tmp_path, 1).write_bytes(b"not a picture")
    with pytest.raises(ImageError, match=r"00001/samples/0000\.png"):
        list(read_pictures(tmp_path, 7))
    with pytest.raises(FileNotFoundError, match=r"00009/samples/0000\.png"):
        read_picture(tmp_path, 9)


def test_a_real_model_draws_the_same_picture_in_any_batch(tmp_path):
    model = load_pipeline(make_tiny_folder(tmp_path / "model"), device="cpu")
    table = evaluation_table(model.schedule, 3)
    prompts = ["a small red circle", "two large blue squares", "three green crosses"]
    alone, together = pictures(model, 1, table, prompts), pictures(model, 3, table, prompts)
    for i in range(3):
        assert alone[i].shape == (3, model.resolution, model.resolution) and alone[i].std() > 0.01
        # Kernels may sum in another order for another batch size: at most one level of 255.
        torch.testing.assert_close(alone[i], together[i], atol=1 / 255, rtol=0)
    assert save(model, tmp_path / "pictures", prompts=prompts, table=table) == [[0, 1, 2]]
    torch.testing.assert_close(read_picture(tmp_path / "pictures", 1), together[1], atol=0.51 / 255, rtol=0)
