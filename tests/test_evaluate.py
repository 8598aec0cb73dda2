"""`evaluate` from the command line: models, checkpoints, samplers, shards, lists of prompts, what is refused."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers_tiny import make_tiny_folder
from PIL import Image

from diffusion_align import cli
from diffusion_align.commands.evaluate import judging, results
from diffusion_align.commands.prompt_lists import Prompt, by_category, evaluation_prompts, kinds
from diffusion_align.data import write_pairs_parquet
from diffusion_align.data.images import encode_png
from diffusion_align.models.hub import asset
from diffusion_align.shapes import parse, sample_captions

QUICK = ["--num_prompts", "6", "--steps", "2", "--reward", "none", "--features", "none", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps on a random model of 64-pixel pictures, with checkpoints at 4 and 6."""
    folder = tmp_path_factory.mktemp("toys")
    model = make_tiny_folder(folder / "model")
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    source = torch.Generator().manual_seed(0)
    captions = sample_captions(8, 0, unique=True)
    pictures = [[encode_png(torch.rand(3, 64, 64, generator=source)) for _ in captions] for _ in range(2)]
    write_pairs_parquet(folder / "pairs.parquet", captions, *pictures, [1.0, 0.0] * 4)
    argv = f"""train dpo --pretrained_model_name_or_path {model} --train_data_dir {folder / "pairs.parquet"}
        --output_dir {folder / "run"} --cache_dir {folder / "cache"} --max_train_steps 6 --checkpointing_steps 4
        --learning_rate 1e-2 --validation_sampling_steps 2 --validation_prompt circle --device cpu""".split()
    assert cli.main(argv) == 0
    return folder / "run"


def evaluate(out, *argv):
    code = cli.main(["evaluate", "--output_dir", str(out), *QUICK, *(str(word) for word in argv)])
    return code, json.loads((out / "report.json").read_text()) if (out / "report.json").exists() else None


def pictures_of(out, side):
    """Bytes of one side's pictures, by sampler and place."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for folder in sorted((out / "evaluation").glob(f"{side}-*"))
        for path in sorted(folder.rglob("*.png"))
    }


def test_models_and_checkpoints_side_by_side(run, tmp_path, capsys):
    last, middle = (run / "checkpoints" / f"step-{step:08d}" for step in (6, 4))
    code, report = evaluate(tmp_path, run, last, middle, run.parent / "model")
    assert code == 0
    said = capsys.readouterr().out
    rows = {(row["model"], row["sampler"]): row["metrics"] for row in report["comparisons"]}
    names = ("run", "run step-00000006", "run step-00000004", "model")
    assert list(rows) == [(name, sampler) for name in names for sampler in ("dpmpp", "ddim")]
    assert all(f"{name} ddim" in said for name in names) and "From base to run," in said
    # The last checkpoint is what the run exported, and the model by itself is the base, so nothing changed.
    assert rows["run", "ddim"] == rows["run step-00000006", "ddim"]
    assert all(m["difference"] in (0, None) for m in rows["model", "dpmpp"].values())
    assert set(report["order"]) == {"dpmpp", "ddim"} and len(report["order"]["ddim"]) == 5
    models = report["facts"]["models"]
    assert models["base"]["weights"] == models["model"]["weights"] == "base"
    assert len({models[name]["weights"] for name in names[1:3]}) == 2
    table = list(csv.DictReader((tmp_path / "report.csv").read_text().splitlines()))
    assert len(table) == 6 * 2 * 5 and {row["model"] for row in table} == {"base", *names}


def test_a_single_run_reports_into_its_own_folder(run, capsys):
    assert cli.main(["evaluate", str(run), *QUICK, "--sampler", "dpmpp"]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["model"] == "tuned" and report["config"]["train"]["max_train_steps"] == 6
    assert len(report["comparisons"]) == 1 and (run / "pairs.png").exists()
    before = {path: path.stat().st_mtime_ns for path in (run / "evaluation").rglob("*.png")}
    assert cli.main(["evaluate", str(run), *QUICK]) == 0  # by one more sampler: nothing is drawn twice
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert len(list((run / "evaluation").rglob("*.png"))) == 2 * len(before)


def test_reports_on_several_models_have_their_own_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    middle = run / "checkpoints" / "step-00000004"
    assert cli.main(["evaluate", str(run), str(middle), *QUICK, "--sampler", "ddim", "--pictures", "0"]) == 0
    assert [path.name for path in (tmp_path / "evaluations").iterdir()] == ["run-run-step-00000004"]
    assert (tmp_path / "evaluations" / "run-run-step-00000004" / "report.html").exists()


def test_shards_draw_the_same_pictures_and_the_last_one_reports(run, tmp_path, capsys):
    several, more = ("--num_images_per_prompt", "2", "--batch_size", "3"), ("--sampler", "dpmpp")
    assert evaluate(tmp_path / "whole", run, *several, *more)[0] == 0
    for shard in ("2/3", "0/3"):
        assert evaluate(tmp_path / "parts", run, *several, *more, "--shard", shard) == (0, None)
        assert f"shard {shard} is drawn" in capsys.readouterr().out
    code, report = evaluate(tmp_path / "parts", run, *several, *more, "--shard", "1/3")
    assert code == 0 and report["metrics"]["judge/all"]["n"] == 12
    for side in ("base", "tuned"):
        parts, whole = pictures_of(tmp_path / "parts", side), pictures_of(tmp_path / "whole", side)
        assert parts.keys() == whole.keys() and len(whole) == 12
        # A kernel may sum in another order in a batch of another size: at most one level of 255.
        for name, shot in whole.items():
            levels = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (shot, parts[name]))
            assert abs(next(levels) - next(levels)).max() <= 1


def test_training_and_held_out_rewards_are_separate(run, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a photo of a dog", "tag": "single"}, {"prompt": "two cats", "tag": "counting", "seen": 5}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {
        "mine": lambda images, prompts: images.mean((1, 2, 3)),
        "hub/other": lambda images, prompts: images[:, 0, 0, 0],
    }
    monkeypatch.setattr("diffusion_align.options.sample.check_reward", lambda name: name)
    monkeypatch.setattr(judging, "load_reward", lambda name, *, device, seed: known[name])
    more = ["--prompts", prompts, "--num_images_per_prompt", "2", "--held_out_reward", "hub/other", "--sampler", "ddim"]
    code, report = evaluate(tmp_path / "out", run, *more, "--reward", "mine")
    assert code == 0 and set(report["metrics"]) == {"reward", "other"}
    home = next((tmp_path / "out" / "evaluation").glob("tuned-*")) / "ddim"
    shots = [
        np.asarray(Image.open(home / f"0000{i}" / "samples" / f"000{j}.png")) / 255 for i in (0, 1) for j in (0, 1)
    ]
    assert report["metrics"]["reward"]["tuned"] == pytest.approx(np.mean([shot.mean() for shot in shots]), abs=1e-6)
    assert report["metrics"]["other"]["tuned"] == pytest.approx(np.mean([shot[0, 0, 0] for shot in shots]), abs=1e-6)
    assert report["categories"]["tag: counting"]["reward"]["n"] == 2
    assert report["categories"]["tag: counting"]["reward"]["tuned"] == pytest.approx(
        np.mean([shot.mean() for shot in shots[2:]]), abs=1e-6
    )
    assert json.loads((home / "00001" / "metadata.jsonl").read_text()) == rows[1]
    about = json.loads((home / "pictures.json").read_text())
    assert about["solver"] == "ddim" and about["timesteps"][0] == 999 and about["versions"]["torch"]


def test_variety_and_distances(run, tmp_path, monkeypatch):
    """Features are the mean colour here, so that both can be worked out from the files."""
    monkeypatch.setattr(judging, "_features", lambda source, device: lambda images: images.mean((2, 3)))
    more = ["--num_images_per_prompt", "2", "--sampler", "dpmpp", "--features", "tiny"]
    code, report = evaluate(tmp_path / "out", run, *more)
    assert code == 0 and report["features"] == "tiny"
    row = report["comparisons"][0]["diversity"]
    home = next((tmp_path / "out" / "evaluation").glob("tuned-*")) / "dpmpp"
    prompts = [prompt.text for prompt in evaluation_prompts("held-out", 6)]
    colours = {}
    for i, prompt in enumerate(prompts):
        shots = [np.asarray(Image.open(home / f"0000{i}" / "samples" / f"000{j}.png")) / 255 for j in (0, 1)]
        colours.setdefault(prompt, []).extend(shot.mean((0, 1)) for shot in shots)
    apart = []
    for of_one in colours.values():
        unit = [colour / np.linalg.norm(colour) for colour in of_one]
        apart.append(np.mean([1 - a @ b for i, a in enumerate(unit) for b in unit[:i]]))
    assert row["tuned"] == pytest.approx(np.mean(apart), abs=1e-6) and row["n"] == len(colours)
    assert [(d["model"], d["reference"], d["pictures"]) for d in report["distances"]] == [
        ("base", 12, 12),
        ("tuned", 12, 12),
    ]
    assert report["distances"][0]["kid"] > 0.01 and report["distances"][0]["few_for_frechet"]
    own = next((tmp_path / "out" / "evaluation").glob("base-*")) / "dpmpp"
    code, report = evaluate(tmp_path / "out", run, *more, "--reference_pictures", own)
    assert code == 0 and report["distances"][0]["frechet"] == pytest.approx(0, abs=1e-6)
    assert report["distances"][0]["cmmd"] == pytest.approx(0, abs=1e-6) and report["distances"][1]["cmmd"] > 1e-6


def test_disagreeing_samplers_are_reported(capsys):
    of = {"base": 0.5, "tuned": 0.6, "difference": 0.1, "low": None, "high": None, "n": 4, "wins": 1, "losses": 0}
    report = {
        "headline": {"metric": "reward", "sentence": "So."},
        "metrics": {"reward": of},
        "comparisons": [{"model": name, "sampler": "ddim", "metrics": {"reward": of}} for name in "ab"],
        "order": {"dpmpp": ["a", "b", "base"], "ddim": ["b", "a", "base"]},
    }
    assert "the samplers disagree about the order of the models: dpmpp: a > b > base; ddim: b > a > base" in "\n".join(
        results.summary(report)
    )


@pytest.mark.parametrize(
    ("name", "count", "some"), [("parti", 1632, "category: Abstract"), ("geneval", 553, "tag: color_attr")]
)
def test_shipped_lists_of_prompts(name, count, some):
    prompts = evaluation_prompts(name, 10_000)
    assert len(prompts) == count and len(by_category(prompts)[some]) > 20
    assert all(prompt.text == prompt.text.strip() and prompt.text for prompt in prompts)
    assert len(evaluation_prompts(name, 7)) == 7


def test_lists_of_prompts_in_every_form(tmp_path):
    files = {
        "a.txt": "one\n\n two \n",
        "b.json": '["one", {"caption": "two", "skills": ["x", "y"]}]',
        "c.jsonl": '{"prompt": "one"}\n\n{"Prompt": "two", "Style": "x"}\n',
        "d.tsv": 'Prompt\tCategory\tNote\none\tx\ta "quote\ntwo\t\t\n',
    }
    categories = {
        "a.txt": [(), ()],
        "b.json": [(), ("skills: x", "skills: y")],
        "c.jsonl": [(), ("style: x",)],
        "d.tsv": [("category: x",), ()],
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        found = evaluation_prompts(str(tmp_path / name), 9)
        assert [prompt.text for prompt in found] == ["one", "two"]
        assert [prompt.categories for prompt in found] == categories[name]
    captions = sample_captions(40, 0, split="held-out")
    for text, prompt in zip(captions, evaluation_prompts("held-out", 40), strict=True):
        asks = "position" if text.count(" a ") > 1 else "single object" if text.startswith("a ") else "counting"
        assert prompt == Prompt(text, kinds(parse(text))) and prompt.categories == (f"task: {asks}",)
    world = tmp_path / "world.txt"
    world.write_text("two small red circles on a white background\n")
    assert evaluation_prompts(str(world), 1)[0].categories == ("task: counting",)


def test_prompts_without_a_reward_are_reported_side_by_side(run, tmp_path, capsys):
    """Pictures, and with a network of features variety and distances; the default reward is for embedded captions."""
    (tmp_path / "dogs.txt").write_text("a dog\nanother dog\n")
    quick = ["--num_prompts", "2", "--steps", "2", "--sampler", "dpmpp", "--device", "cpu"]
    argv = ["evaluate", str(run), "--prompts", str(tmp_path / "dogs.txt"), *quick]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "plain")]) == 0
    said, report = capsys.readouterr().out, json.loads((tmp_path / "plain" / "report.json").read_text())
    assert "Base and tuned side by side on 2 prompts; nothing scored them." in said
    assert report["headline"]["metric"] is None and report["metrics"] == {} and report["facts"]["rewards"] == "none"
    assert {(entry["index"], entry["why"]) for entry in report["shown"]} == {(0, "drawn"), (1, "drawn")}
    page = (tmp_path / "plain" / "report.html").read_text()
    assert page.count("data:image/png") == 4 and "another dog" in page and "NaN" not in page and "None" not in page
    assert (tmp_path / "plain" / "pairs.png").exists()

    (tmp_path / "real").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "real" / "black.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "real" / "red.png")
    clip = str(asset("tiny_clip"))
    more = ["--features", clip, "--reference_pictures", str(tmp_path / "real"), "--num_images_per_prompt", "2"]
    assert cli.main([*argv, *more, "--output_dir", str(tmp_path / "more")]) == 0
    report = json.loads((tmp_path / "more" / "report.json").read_text())
    assert report["comparisons"][0]["diversity"]["n"] == 2 and report["distances"][0]["reference"] == 2
    assert "variety tuned dpmpp" in capsys.readouterr().out
    page = (tmp_path / "more" / "report.html").read_text()
    assert "<h2>Variety</h2>" in page and "<h2>Distance to real pictures</h2>" in page


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('{"prompt": "a"}\n{"text": 5}\n', "x.jsonl", "x.jsonl:2 the prompt is int, not text; give a .txt"),
        ('{"prompt": "a"}\n{"prom', "x.jsonl", "x.jsonl:2 is not JSON"),
        ("[]", "x.json", "holds no rows"),
        ("Words\tCategory\na\tb\n", "x.tsv", "it has 'words', 'category'"),
    ],
)
def test_bad_lists_are_errors_of_one_line(run, tmp_path, capsys, content, name, message):
    (tmp_path / name).write_text(content)
    assert evaluate(tmp_path, run, "--prompts", tmp_path / name)[0] == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--shard", "3/3"), 2, "K from 0 to N - 1"),
        (("--held_out_reward", "x", "--held_out_reward", "x"), 2, "reward 'x' is given twice"),
        (("{run}",), 2, "given twice"),
        (("--held_out_reward", "people"), 2, "data annotate"),
        (("--held_out_reward", "pikscore"), 2, "unknown reward pikscore; did you mean pickscore?"),
        (("--reference_pictures", "{run}/samples/base/none"), 2, "no .png, .jpg or .webp lies in"),
        (
            ("--prompts", "{dogs}", "--reward", "tiny"),
            2,
            "the embedded reward knows captions of the embedded world only",
        ),
        (("{run}/checkpoints/step-00000009",), 1, "step-00000009: no such run, checkpoint or model"),
        (("runs-that-are-not",), 1, "runs-that-are-not: no such run"),
    ],
)
def test_bad_options_are_refused_before_drawing(run, tmp_path, capsys, more, code, message):
    (tmp_path / "dogs.txt").write_text("a dog\nanother dog\n")
    words = [word.format(run=run, dogs=tmp_path / "dogs.txt") for word in more]
    assert evaluate(tmp_path / "out", run, *words)[0] == code
    assert message in capsys.readouterr().err
    assert not Path(tmp_path / "out").exists()


@pytest.fixture(scope="module")
def small_run(run):
    """The same model trained at 32 pixels, half its own side, with grids and without."""
    folder = run.parent
    argv = f"""train dpo --pretrained_model_name_or_path {folder / "model"} --train_data_dir {folder / "pairs.parquet"}
        --cache_dir {folder / "cache-32"} --resolution 32 --max_train_steps 1 --validation_sampling_steps 1
        --validation_prompt circle --device cpu""".split()
    for name, more in (("run-32", []), ("no-grids", ["--run_validation=false"])):
        AcceleratorState._reset_state(True)
        assert cli.main([*argv, "--output_dir", str(folder / name), *more]) == 0
    return folder / "run-32"


def sides(folder):
    found = set()
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            found.add(picture.size)
    return found


def test_a_run_is_drawn_at_its_training_resolution(small_run, tmp_path):
    assert sides(small_run / "samples" / "base") == {(32, 32)}
    assert evaluate(tmp_path / "own", small_run, "--reward", "random")[0] == 0
    assert sides(tmp_path / "own" / "evaluation") == {(32, 32)}
    assert evaluate(tmp_path / "asked", small_run, "--resolution", "64")[0] == 0
    assert sides(tmp_path / "asked" / "evaluation") == {(64, 64)}
    draw = ["sample", "--run", str(small_run), "--prompt", "a circle", "--steps", "1", "--device", "cpu", "--out"]
    for more, side in (([], 32), (["--resolution=64"], 64)):
        out = tmp_path / f"sample-{side}"
        assert cli.main([*draw, str(out), *more]) == 0
        assert sides(out) == {(side, side)} and json.loads((out / "samples.json").read_text())["resolution"] == side


def test_runs_of_two_resolutions_need_the_option(run, small_run, tmp_path, capsys):
    assert evaluate(tmp_path, run, small_run)[0] == 1
    said = capsys.readouterr().err
    assert "different resolutions (run: its own, run-32: 32): choose one with --resolution" in said
    assert not (tmp_path / "evaluation").exists()


def test_a_run_without_grids_draws_none(small_run):
    run = small_run.parent / "no-grids"
    assert not (run / "samples").exists() and (run / "pytorch_lora_weights.safetensors").is_file()
