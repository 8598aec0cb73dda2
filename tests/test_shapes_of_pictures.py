"""Pictures of many shapes through the command: buckets, crops, mirror images, sizes told to SDXL, and refusals."""

import json
import shutil

import pytest
import torch
from helpers_sdxl import make_tiny_sdxl_folder
from PIL import Image
from safetensors.torch import load_file

from diffusion_align import cli
from diffusion_align.data.cache import PairCache
from diffusion_align.data.frames import Frames, told_sizes
from diffusion_align.methods.shared.noising import Networks, noised_lists, pick
from diffusion_align.models import load_pipeline

SIZES = [(64, 64), (96, 64), (64, 96), (160, 80)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """24 pairs of pictures of four shapes."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i in range(24):
        for side, level in (("w", 60), ("l", 180)):
            colour = (level + 2 * i, 255 - level, 9 * i)
            Image.new("RGB", SIZES[i % 4], colour).save(folder / f"{side}{i}.png")
        rows.append({"prompt": f"picture {i % 5}", "chosen": f"w{i}.png", "rejected": f"l{i}.png"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(pairs, out, *words, model="tiny", method="dpo"):
    argv = ["train", method, "--model", str(model), "--train_data_dir", str(pairs), "--output_dir", str(out)]
    argv += ["--run_validation", "false", "--threads", "1", "--train_batch_size", "2", "--seed", "3"]
    argv += ["--beta_dpo", "200"] if method == "dpo" else []
    return cli.main([*argv, *words])


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_buckets_crops_and_mirrors_stops_and_goes_on_with_the_same_bits(pairs, tmp_path, capsys):
    words = ["--aspect_buckets", "--random_crop", "--crop_variants", "2", "--random_flip", "--cache_dir", str(tmp_path)]
    words += ["--gradient_accumulation_steps", "2", "--max_train_steps", "6", "--checkpointing_steps", "3"]
    assert train(pairs, tmp_path / "whole", *words) == 0
    out = capsys.readouterr().out
    assert "buckets          " in out and " shapes: " in out
    manifests = [json.loads(path.read_text())["identity"] for path in (tmp_path / "encoded").glob("*/manifest.json")]
    assert len(manifests) == 1 and manifests[0]["variants"] == 4 and manifests[0]["frames"]["buckets"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for left in ("checkpoints/step-00000006", "pytorch_lora_weights.safetensors"):
        path = tmp_path / "again" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resume = ["--resume_from_checkpoint", "latest"]
    assert train(pairs, tmp_path / "again", *words, *resume) == 0
    both = [load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("whole", "again")]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])
    assert [row["loss"] for row in rows_of(tmp_path / "whole")] == [row["loss"] for row in rows_of(tmp_path / "again")]
    # The stream depends on the micro-batch, so another one is refused, by name.
    other = ["--train_batch_size", "4", "--gradient_accumulation_steps", "1", "--max_train_steps", "7"]
    assert train(pairs, tmp_path / "again", *words, *other, *resume) == 1
    assert "micro_batch was 2 and is now 4" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--loss_type", "kto"]], ids=["dpo", "kto"])
def test_every_method_on_pairs_takes_buckets(pairs, tmp_path, words):
    steps = ["--aspect_buckets", "--max_train_steps", "2", "--random_flip"]
    assert train(pairs, tmp_path / "run", *steps, *words) == 0
    assert len(rows_of(tmp_path / "run")) == 2


def sides(folder):
    found = set()
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            found.add(picture.size)
    return found


def test_width_x_height_in_training_grids_sample_and_evaluate(pairs, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--resolution", "48x32", "--max_train_steps", "1", "--validation_prompts", "a circle"]
    words += ["--validation_sampling_steps", "1", "--run_validation", "true", "--validation_steps", "1"]
    assert train(pairs, run, *words) == 0
    assert sides(run / "samples" / "base") == {(48, 32)}
    (home,) = (run / "cache").iterdir()
    cache = PairCache(home)
    assert cache.identity["resolution"] == "48x32" and cache.groups is None
    assert cache.batch([0])[0].shape[3:] == (8, 12)  # the tiny model's latents have a fourth of the side
    draw = ["sample", "--run", str(run), "--prompt", "a circle", "--steps", "1", "--device", "cpu", "--out"]
    for more, size in (([], (48, 32)), (["--resolution=32x64"], (32, 64)), (["--resolution=32"], (32, 32))):
        out = tmp_path / f"sample-{len(more) and more[0]}"
        assert cli.main([*draw, str(out), *more]) == 0 and sides(out) == {size}
    judge = ["evaluate", str(run), "--num_prompts", "2", "--steps", "1", "--reward", "random", "--device", "cpu"]
    assert cli.main([*judge, "--sampler", "ddim", "--output_dir", str(tmp_path / "evaluation")]) == 0
    assert sides(tmp_path / "evaluation" / "evaluation") == {(48, 32)}
    # A resumed run keeps its size.
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", "2", "--resolution", "32x48"]
    capsys.readouterr()
    assert train(pairs, run, *words, *resume) == 1
    assert "resolution was '48x32' and is now '32x48'" in capsys.readouterr().err


def test_center_crop_false_is_random_crop(pairs, tmp_path):
    words = ["--max_train_steps", "1", "--crop_variants", "2", "--cache_dir", str(tmp_path)]
    assert train(pairs, tmp_path / "one", "--center_crop", "false", *words) == 0
    assert train(pairs, tmp_path / "two", "--random_crop", *words) == 0
    assert len(list((tmp_path / "encoded").iterdir())) == 1
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return make_tiny_sdxl_folder(tmp_path_factory.mktemp("xl") / "model")


def test_sdxl_is_told_the_size_and_crop_of_each_picture(pairs, tmp_path, xl):
    words = ["--size_conditioning", "pictures", "--resolution", "32", "--max_train_steps", "1", "--random_crop"]
    assert train(pairs, tmp_path / "run", *words, "--aspect_buckets", model=xl) == 0
    (home,) = (tmp_path / "run" / "cache").iterdir()
    cache, model = PairCache(home), load_pipeline(xl, device="cpu")
    networks = Networks(model.predict, None, model.schedule, model.prediction_type, told_sizes=True)
    samples = [(0, i) for i in range(len(cache)) if cache.groups[i] == cache.groups[1]][:3]
    latents, text, told = pick(cache, samples, networks, seed=3)
    noised = noised_lists(latents, text, samples, networks, 3, told=told)
    frames = Frames(32, True, 8, 4)
    for row, (_, i) in enumerate(samples):
        size = SIZES[cache.kept[i] % 4]
        possible = [told_sizes(size, frame) for frame in frames.of_list([size, size], 3, cache.kept[i])]
        for entry in (0, 1):  # all winners, then all losers
            sizes = noised.text[entry * len(samples) + row, -1, :6].tolist()
            assert sizes in possible and sizes[:2] == [size[1], size[0]]
            assert sizes[4:] == [side * 4 for side in latents.shape[3:]]
    untold = noised_lists(latents, text, samples, networks, 3).text
    assert not untold[:, -1].any()
    assert (
        model.predict(noised.x, noised.t, noised.text) - model.predict(noised.x, noised.t, untold)
    ).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("words", "message", "cure"),
    [
        (["--resolution", "60"], "60 is not a positive multiple of 16", ["--resolution", "64"]),
        (["--resolution", "8"], "use 16", ["--resolution", "16"]),
        (["--resolution", "60x32"], "use 48x32 or 64x32", ["--resolution", "64x32"]),
        (
            ["--aspect_buckets", "--bucket_step", "24"],
            "not a multiple of 16",
            ["--aspect_buckets", "--bucket_step", "16"],
        ),
        (["--size_conditioning", "pictures"], "is for SDXL", []),
    ],
)
def test_what_cannot_be_is_refused_before_encoding_and_the_cure_works(pairs, tmp_path, capsys, words, message, cure):
    assert train(pairs, tmp_path / "run", "--max_train_steps", "1", *words) != 0
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1 and not list(tmp_path.rglob("pairs-*.safetensors"))
    assert train(pairs, tmp_path / "cured", "--max_train_steps", "1", *cure) == 0


def test_a_size_that_cannot_be_halved_is_refused_from_the_files_of_the_model(pairs, tmp_path, capsys, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("diffusion_align.models.load_pipeline", load)
    for words in ([], ["--dry-run"]):
        assert train(pairs, tmp_path / "run", "--max_train_steps", "1", "--resolution", "100x64", *words) != 0
        assert "use 96x64 or 112x64" in capsys.readouterr().err
