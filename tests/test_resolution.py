"""Pictures that are not square, from the option to the files: training, drawing, evaluation and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from helpers_cache import FakeModel
from helpers_tiny import make_tiny_folder
from PIL import Image
from stress.runs import differences, end_of, flags, make_world, train

from diffusion_align import cli
from diffusion_align.commands.model_facts import read_model_facts
from diffusion_align.data import EncodingSettings, Pair, build_cache
from diffusion_align.data.frames import Frames
from diffusion_align.data.images import encode_png
from diffusion_align.models import load_pipeline
from diffusion_align.options import VERBS, UsageError, options_of, parse, resolve, to_yaml
from diffusion_align.picture_size import read_size
from diffusion_align.picture_size import sides as width_and_height
from diffusion_align.rng import draw_normal, generator, normal

WITH_RESOLUTION = [words for words, verb in VERBS.items() if "resolution" in options_of(verb.options)]


def resolution_of(width, height):
    return read_size(f"{width}x{height}")


def read(words, *argv):
    options = VERBS[words].options
    parsed = parse(options, list(argv), words, VERBS[words].positional)
    return resolve(options, words, config=parsed.config, settings=parsed.settings).options


def sizes(folder):
    """Width and height of all pictures in a folder."""
    found = set()
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            found.add(picture.size)
    return found


def test_which_commands_take_a_resolution():
    drawing = {"reward train-spm", "sample", "evaluate", "data synth"}
    assert set(WITH_RESOLUTION) == {words for words in VERBS if words.startswith("train ")} | drawing


@pytest.mark.parametrize("words", WITH_RESOLUTION)
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("512", 512),
        ("512x512", 512),
        ("512,512", 512),
        ("832x1216", "832x1216"),
        ("832,1216", "832x1216"),
        ("832, 1216", "832x1216"),
        ("1216X832", "1216x832"),
        ("8x9", "8x9"),
        ("none", None),
    ],
)
def test_texts_that_are_a_resolution(words, text, value):
    found = read(words, f"--resolution={text}").resolution
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    "832*1216 832x x832 832x1216x3 7 7x64 64x7 0x64 -64x64 64x-64 64x96px 12.5 64.0x96 true ² []".split(),
)
def test_texts_that_are_no_resolution(text):
    wanted = (
        f"data.resolution must be a whole number, or width x height as in 768x512, with sides at least 8, not {text!r}"
    )
    with pytest.raises(UsageError) as caught:
        read("train dpo", "--resolution", text) if not text.startswith("-") else read("train dpo", f"resolution={text}")
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("resolution: 512", 512),
        ("resolution: 832x1216", "832x1216"),
        ('resolution: "832x1216"', "832x1216"),
        ("resolution: 512,512", 512),
        ("data: {resolution: 832x1216}", "832x1216"),
        ("resolution: null", None),
    ],
)
@pytest.mark.parametrize("words", ["train dpo", "train d3po"])
def test_files_hold_a_number_or_a_text(tmp_path, words, line, value):
    (tmp_path / "a.yaml").write_text(line + "\n")
    o = read(words, f"--config={tmp_path / 'a.yaml'}")
    assert o.resolution == value
    (tmp_path / "config.yaml").write_text(to_yaml(o, words))
    assert f"resolution: {'null' if value is None else value}\n" in (tmp_path / "config.yaml").read_text()
    again = read(words, f"--config={tmp_path / 'config.yaml'}")
    assert dataclasses.replace(again, output_dir=o.output_dir) == o


def test_a_number_with_a_leading_zero_in_a_file_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("resolution: 0512\n")
    with pytest.raises(UsageError, match="0512 would be octal in YAML: write 512"):
        read("train dpo", f"--config={tmp_path / 'a.yaml'}")


def test_sides_and_back():
    for resolution, sides in ((512, (512, 512)), ("832x1216", (832, 1216)), ("1216x832", (1216, 832))):
        assert width_and_height(resolution) == sides and resolution_of(*sides) == resolution
    with pytest.raises(ValueError, match="wide"):
        width_and_height("wide")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("small") / "model")


@pytest.mark.parametrize(
    ("resolution", "cure"),
    [
        ("30x32", ["24x32", 32]),
        ("32x30", ["32x24", 32]),
        ("30x61", ["24x56", "32x64"]),
        ("4x64", ["8x64"]),
        (30, [24, 32]),
    ],
)
def test_both_sides_must_fit_the_model_and_the_cure_does(small, resolution, cure):
    model = load_pipeline(small, device="cpu")
    with pytest.raises(ValueError) as caught:
        model.latent_shape(resolution)
    assert str(caught.value).endswith(f"use {' or '.join(map(str, cure))}") and f"resolution {resolution} " in str(
        caught.value
    )
    for fits in cure:
        assert model.latent_shape(fits)[1:] == tuple(side // 4 for side in reversed(width_and_height(fits)))


def test_a_plan_counts_both_sides(small):
    facts, model = read_model_facts(str(small)), load_pipeline(small, device="cpu")
    assert facts.latent_shape("32x48") == model.latent_shape("32x48") == (4, 12, 8)
    assert facts.latent_shape(None) == facts.latent_shape("32x32") == (4, 8, 8)


def test_a_picture_is_what_diffusers_draws_at_this_width_and_height(small, tmp_path):
    argv = f"""sample --model {small} --prompt circle --resolution 32x48 --steps 4 --guidance 3 --seed 5 --device cpu
        --out {tmp_path}""".split()
    assert cli.main(argv) == 0
    pipe = StableDiffusionPipeline.from_pretrained(small, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    noise = draw_normal((4, 12, 8), generator(5, "sample", 0, 0))[None]
    theirs = pipe(
        "circle", width=32, height=48, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="np"
    ).images[0]
    with Image.open(tmp_path / "0000-00.png") as picture:
        ours = np.asarray(picture) / 255
    assert ours.shape == theirs.shape == (48, 32, 3) and np.abs(ours - theirs).max() < 2 / 255
    assert ours.std() > 0.01


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def argv_of(world, method, run, resolution):
    """Four steps with sample grids, at this resolution; the embedded world's own is 64."""
    return [*flags(world, method, run), "--max_train_steps=4", "--lr_warmup_steps=1", f"--resolution={resolution}"]


@pytest.fixture(scope="module", params=["dpo", "d3po"])
def run(world, request):
    folder = world / f"{request.param}-64x96"
    assert train(argv_of(world, request.param, folder, "64x96"))[0] == 0
    return folder


def test_a_run_its_grids_samples_and_evaluation_have_its_width_and_height(world, run, tmp_path):
    assert sizes(run / "samples" / "base") == {(64, 96)}
    with Image.open(run / "samples" / "step-00000004.png") as grid:  # two pictures side by side, each pixel twice
        assert grid.size[0] == 16 + 2 * 192 + 6 + 16 and grid.size[1] > 192
    draw = ["sample", "--run", str(run), "--prompt=circle", "--steps=1", "--device=cpu", "--out"]
    for more, size in (([], (64, 96)), (["--resolution=96x64"], (96, 64)), (["--resolution=32"], (32, 32))):
        out = tmp_path / f"{size[0]}"
        assert cli.main([*draw, str(out), *more]) == 0
        assert sizes(out) == {size}
        assert json.loads((out / "samples.json").read_text())["resolution"] == resolution_of(*size)
    words = f"""evaluate {run} --output_dir {tmp_path / "report"} --num_prompts 2 --steps 1 --reward none
        --sampler dpmpp --features none --device cpu""".split()
    assert cli.main(words) == 0
    assert sizes(tmp_path / "report" / "evaluation") == {(64, 96)}
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["facts"]["resolution"] == "64x96"


def test_a_run_is_not_resumed_at_another_resolution(world, run):
    method = run.name.partition("-")[0]
    for other in (64, "96x64"):  # the second has as many pixels, so beta stays
        code, said = train([*argv_of(world, method, run, other), "--resume=latest"])
        assert code == 1 and "resolution was" in said
    assert train([*argv_of(world, method, run, "64,96"), "--resume=latest"])[0] == 0


def test_equal_sides_are_the_run_of_one_number(world, tmp_path):
    """Bit for bit, and with the same encodings, whose identity is that of earlier versions."""
    for name, resolution in (("one", 64), ("two", "64x64")):
        argv = argv_of(world, "dpo", tmp_path / name, resolution)
        assert train([*argv, "--cache_dir", str(tmp_path / "cache")])[0] == 0
    assert list(differences(tmp_path / "one", end_of(tmp_path / "two"))) == []
    configs = [(tmp_path / name / "config.yaml").read_text().replace(f"/{name}", "/") for name in ("one", "two")]
    assert configs[0] == configs[1] and "resolution: 64\n" in configs[0]
    (manifest,) = (tmp_path / "cache").rglob("manifest.json")
    assert json.loads(manifest.read_text())["identity"]["resolution"] == 64


class Recorder(FakeModel):
    """Keeps the pictures that it is given."""

    def latent_shape(self, resolution=None):
        width, height = width_and_height(resolution)
        return 4, height // 4, width // 4

    def encode_images(self, images, noise):
        self.given = images
        assert noise.shape == (len(images), *self.latent_shape(resolution_of(*images.shape[:1:-1])))
        return noise


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize(
    ("resolution", "box"),
    [("64x96", (30, 0, 70, 60)), ("96x32", (0, 13 + 1 / 3, 100, 46 + 2 / 3)), (64, (20, 0, 80, 60))],
)
def test_pictures_are_cropped_to_the_shape(tmp_path, resolution, box, framed):
    """The middle of a picture of 100 x 60, by hand: 60 x 64 / 96 = 40 columns, 100 / 3 rows, 60 columns."""
    drawn = normal((60, 100, 3), 0, "picture").mul(40).add(128).clamp(0, 255).byte().numpy()
    pair = Pair(
        "a", "a circle", encode_png(torch.tensor(drawn).permute(2, 0, 1) / 255), encode_png(torch.zeros(3, 8, 8))
    )
    model, frames = Recorder(), Frames(resolution) if framed else None
    cache = build_cache(model, [pair], tmp_path, EncodingSettings(resolution, frames=frames), progress=False)
    sides = width_and_height(resolution)
    wanted = Image.fromarray(drawn).resize(sides, Image.Resampling.LANCZOS, box=box)
    levels = model.given[0].permute(1, 2, 0).numpy() * 255
    assert levels.shape == (*sides[::-1], 3)
    assert np.abs(levels - np.asarray(wanted)).max() < 1.5  # one level of rounding
    assert cache.identity["resolution"] == resolution
    assert cache.batch([0])[0].shape == (1, 2, 4, sides[1] // 4, sides[0] // 4)
    if framed:  # height, width, top and left of the crop once resized, height and width of the crop
        scale = sides[0] / (box[2] - box[0])
        crop = [round(box[1] * scale), round(box[0] * scale)]
        assert cache.told([0])[0, 0].tolist() == [60, 100, *crop, sides[1], sides[0]]


def test_synthetic_pictures_and_a_preference_model_of_them(world, tmp_path, capsys):
    words = f"""data synth --models {world / "model"} --prompts {world / "prompts.txt"} --num_prompts 3 --pictures 2
        --rewards random --steps 1 --resolution 64x96 --device cpu --out {tmp_path / "synth"}""".split()
    assert cli.main(words) == 0 and sizes(tmp_path / "synth") == {(64, 96)}
    assert cli.main([*words, "--resolution=96x64"]) == 1
    assert "holds pictures made with other resolution: choose another --out" in capsys.readouterr().err
    words = f"""reward train-spm --model {world / "model"} --train_data_dir {tmp_path / "synth" / "pairs.parquet"}
        --inputs latents --resolution 64x96 --held_out 0 --max_train_steps 1 --train_batch_size 1 --device cpu
        --output_dir {tmp_path / "spm"}""".split()
    assert train(words)[0] == 0
    config = json.loads((tmp_path / "spm" / "open_clip_config.json").read_text())
    assert config["step_aware"]["latents"] == [4, 24, 16]
