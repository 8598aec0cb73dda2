"""`train rankdpo` end to end at toy size: a run folder, an interruption, a plan, and bad input in one line."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers_sdxl import make_tiny_sdxl_folder
from helpers_tiny import make_tiny_folder
from PIL import Image
from test_scripts import LORA, script, weights_of

from diffusion_align import cli
from diffusion_align.commands.data import synth_chunks
from diffusion_align.commands.train import items
from diffusion_align.data import Ranking, read_rankings, write_pairs_parquet, write_rankings_parquet
from diffusion_align.data.images import encode_png
from diffusion_align.methods import rankdpo
from diffusion_align.options.train.rankdpo import METRICS
from diffusion_align.shapes import sample_captions
from diffusion_align.train import record

LENGTHS = [3, 3, 4, 3, 2, 3, 4, 3, 3, 3]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def make_rankings(count=10, shift=0):
    """Rankings of 64-pixel noise, of several lengths; `shift` turns the labels."""
    source = torch.Generator().manual_seed(0)
    rankings = []
    for i, (caption, k) in enumerate(zip(sample_captions(count, 0, unique=True), LENGTHS, strict=True)):
        pictures = tuple(encode_png(torch.rand(3, 64, 64, generator=source)) for _ in range(k))
        relevance = tuple(((j + shift) % k) / (k - 1) for j in range(k))
        rankings.append(Ranking(str(i), caption, pictures, relevance))
    return rankings


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rankdpo")
    model = make_tiny_folder(folder / "model")
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    for name, shift in (("rankings", 0), ("others", 1)):
        lines = []
        for ranking in make_rankings(shift=shift):
            files = [f"{ranking.id}-{i}.png" for i in range(len(ranking.pictures))]
            for file, picture in zip(files, ranking.pictures, strict=True):
                (folder / file).write_bytes(picture)
            lines.append(json.dumps({"prompt": ranking.prompt, "images": files, "relevance": ranking.relevance}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def argv(toys, run, *more, data="rankings.jsonl", model="model"):
    flags = f"""--pretrained_model_name_or_path {toys / model} --train_data_dir {toys / data} --output_dir {run}
        --cache_dir {toys / "cache"} --max_train_steps 6 --checkpointing_steps 4 --learning_rate 1e-3
        --validation_sampling_steps 2 --validation_prompt circle --device cpu"""
    return [*flags.split(), *more]


def train(toys, run, *more, **where):
    """Six short steps with the script that `accelerate launch` starts; returns its exit code."""
    AcceleratorState._reset_state(True)
    return script("finetune_rankdpo")(argv(toys, run, *more, **where))


@pytest.fixture(scope="module")
def finished(toys):
    assert train(toys, toys / "finished") == 0
    return toys / "finished"


def test_a_run_starts_where_the_plan_says_and_diffusers_loads_it(toys, finished, capsys):
    rows = record.read(finished / "metrics.jsonl")
    assert set().union(*rows) == {"step", "epoch", "threads", *METRICS}
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[0]["samples"] == 4
    assert rows[0]["loss"] == pytest.approx(math.log(2) * rows[0]["pair_weight"], rel=1e-6)
    assert rows[0]["implicit_accuracy"] == 0.5 and rows[0]["winner_error_gap"] == 0 and rows[-1]["margin_p95"] != 0
    pipe = StableDiffusionPipeline.from_pretrained(toys / "model", safety_checker=None)
    pipe.load_lora_weights(finished)
    # All ten rankings in one step: the loss is that of the plan.
    run = toys / "all"
    more = ("--train_batch_size", "10", "--max_train_steps", "1")
    assert train(toys, run, *more) == 0
    first = record.read(run / "metrics.jsonl")[0]
    capsys.readouterr()
    assert train(toys, run, *more, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"loss             starts at {first['loss']:.4f}" in said
    assert f"pairs weigh {first['pair_weight']:.4f} together" in said


def test_an_interrupted_run_goes_on_as_if_it_never_stopped(toys, finished, tmp_path, monkeypatch, capsys):
    run, append = tmp_path / "cut", record.append

    def ctrl_c(path, row):
        append(path, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(record, "append", ctrl_c)
        assert train(toys, run) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"step 3 is saved; continue with: diffusion-align train rankdpo --config {run}/config.yaml" in said
    AcceleratorState._reset_state(True)
    assert cli.main(said.partition("continue with: diffusion-align ")[2].split()) == 0
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert weights_of(run) == weights_of(finished)


def test_resumes_with_other_settings_are_refused(toys, finished, capsys):
    labels = "the relevance of the rankings' pictures changed: --train_data_dir"
    cases = [("beta", ("--beta=100",), {}), (labels, (), {"data": "others.jsonl"}),
             ("shared_noise", ("--shared_noise",), {}), ("discount", ("--discount=log2",), {}),
             ("pair_norm", ("--pair_norm=num_pairs",), {})]  # fmt: skip
    for name, more, where in cases:
        assert train(toys, finished, "--resume=latest", *more, **where) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"this run is not the one that was saved: {name} was" in said
    # Other labels on the same pictures were not encoded again.
    assert len(list((toys / "cache" / "encoded").iterdir())) == 1


@pytest.mark.parametrize(
    "more", [("--one_picture_at_a_time",), ("--train_batch_size=2", "--gradient_accumulation_steps=2")]
)
def test_how_a_step_is_cut_changes_only_the_rounding(toys, finished, tmp_path, more):
    assert train(toys, tmp_path / "run", *more) == 0
    rows, whole = (record.read(run / "metrics.jsonl") for run in (tmp_path / "run", finished))
    for key in ("loss", "grad_norm", "winner_error_gap", "pair_weight"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in whole], rel=2e-3, abs=1e-6), key


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_it_runs_on_an_sdxl_format_folder(tmp_path, mode):
    make_tiny_sdxl_folder(tmp_path / "xl")
    write_rankings_parquet(tmp_path / "rankings.parquet", make_rankings())
    more = ("--max_train_steps", "2", "--mode", mode, "--one_picture_at_a_time", "--mixed_precision", "bf16")
    assert train(tmp_path, tmp_path / "run", *more, model="xl", data="rankings.parquet") == 0
    assert record.read(tmp_path / "run" / "metrics.jsonl")[0]["margin_p95"] == 0
    if mode == "lora":
        pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl")
        pipe.load_lora_weights(tmp_path / "run")
        assert (tmp_path / "run" / LORA).exists()


def test_pairs_are_rankings_of_two(toys, tmp_path):
    """log 2 times 1 / log 2 - 1 / log 3."""
    pictures = [ranking.pictures for ranking in make_rankings()]
    captions = [ranking.prompt for ranking in make_rankings()]
    left, right = ([some[side] for some in pictures] for side in (0, 1))
    write_pairs_parquet(toys / "pairs.parquet", captions, left, right, [1.0, 0.0] * 5)
    assert train(toys, tmp_path / "run", "--max_train_steps=1", data="pairs.parquet") == 0
    row = record.read(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(1 - math.log(2) / math.log(3), rel=1e-6)


def test_dry_run_says_what_will_happen_and_is_a_config(toys, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    more = ("--dry-run", "--max_train_samples", "5", "--one_picture_at_a_time", "--gradient_accumulation_steps", "3")
    assert train(toys, tmp_path / "run", *more) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for line in (
        "# rankings         10 rows: 10 rankings, 0 ties dropped, 0 bad, of which the first 5",
        "4 per device x 2 devices x 3 accumulation = 24 prompts",
        "# pictures         2 for each of 1 prompts, 3 for each of 3 prompts, 4 for each of 1 prompts",
        "of 4 pictures: 4 policy with gradient + 4 without + 4 reference, 6 pairs",
        "2500 in the unit of diffusers = 5000 in the unit of salesforce",
    ):
        assert line in said
    (tmp_path / "plan.yaml").write_text(said)
    assert script("finetune_rankdpo")(["--config", str(tmp_path / "plan.yaml"), "--dry_run"]) == 0
    assert capsys.readouterr().out == said


def test_every_number_arrives_where_it_works(toys, tmp_path, monkeypatch):
    seen = {}

    def method(cache, networks, run, relevance, *, loss, **settings):
        seen.update(settings, lists=len(cache), relevance=relevance, **vars(loss), **vars(run))

    def loop(method, run, **settings):
        seen.update(settings)
        return iter(())

    monkeypatch.setattr(rankdpo, "rankings_method", method)
    monkeypatch.setattr(rankdpo, "run_steps", loop)
    more = """--proportion_empty_prompts=0.3 --max_grad_norm=7 --seed=11 --gradient_accumulation_steps=2
        --train_batch_size=3 --max_train_samples=5 --beta=100 --beta_convention=salesforce --pair_norm=num_pairs
        --discount=log2 --shared_noise --one_picture_at_a_time"""
    assert train(toys, tmp_path / "run", *more.split()) == 0
    assert (seen["caption_dropout"], seen["max_grad_norm"], seen["seed"], seen["lists"]) == (0.3, 7.0, 11, 5)
    assert (seen["batch_size"], seen["accumulation"], seen["max_steps"]) == (6, 2, 6)
    assert seen["shared_noise"] and seen["one_graph"] and seen["beta"] == pytest.approx(100 / 2 / 1024)
    assert [len(shares) for shares in seen["relevance"]] == LENGTHS[:5]
    # One pair of two pictures, the second worse by 3: its weight is log2's, and is not divided, as there is one pair.
    phi, scores = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, -3.0]], dtype=torch.float64)
    weight = 1 - 1 / math.log2(3)
    assert float(seen["pair_weights"](phi)[0, 0, 1]) == pytest.approx(weight)
    assert float(seen["of_scores"](scores, phi)) == pytest.approx(weight * math.log1p(math.exp(-3 * 100 / 2048)))
    three = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    together = float(seen["pair_weights"](three).triu().sum())
    assert float(seen["of_scores"](0 * three, three)) == pytest.approx(math.log(2) * together / 3)


def test_the_embedded_rankings_are_asked_for_by_name(toys, tmp_path, monkeypatch, capsys):
    def absent(name):
        raise FileNotFoundError(f"assets/{name} is not there: build it with `python scripts/build_tiny.py`")

    monkeypatch.setattr(items, "asset", absent)
    for more in ((), ("--dry-run",)):
        assert script("finetune_rankdpo")(["--preset", "tiny", "--output_dir", str(tmp_path / "run"), *more]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert "assets/tiny_rankings.parquet is not there: build it" in said and "data synth --models tiny" in said
    monkeypatch.setattr(items, "asset", lambda name: toys / "rankings.jsonl")
    assert script("finetune_rankdpo")(["--preset", "tiny", "--output_dir", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "10 rankings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "images": ["0.png"], "relevance": [1]}], "ranks 1 picture: a ranking needs at least 2"),
        ([{"prompt": "p", "images": ["0.png", "1.png"], "relevance": [1, 1]}], "all 1 rows are ties"),
        ([], "holds no rows"),
    ],
)
def test_bad_data_is_one_line(toys, tmp_path, capsys, rows, message):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(make_rankings()[0].pictures[i])
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(toys, tmp_path / "run", data=tmp_path / "set.jsonl") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said and "set.jsonl" in said and not (tmp_path / "run").exists()


def test_bad_options_are_one_line(toys, capsys):
    for words, message in (
        ([], "which model?"),
        (["--model=tiny"], "which rankings? --train_data_dir PATH or --dataset_name NAME"),
        (["--model=tiny", "--data=a", "--dataset_name=b"], "two sources of rankings"),
        (["--model=tiny", "--data=a", "--pair_norm=mean"], "one of sum, sum_weights, num_pairs, not 'mean'"),
    ):
        assert script("finetune_rankdpo")(words) == 2
        assert message in capsys.readouterr().err
    assert train(toys, toys / "none", "--beta=5000", "--dry-run") == 0
    assert "note: beta_dpo 5000 is in the unit of diffusers' script" in capsys.readouterr().err


def test_a_run_is_a_model_that_synth_draws_with_and_its_rankings_train(toys, finished, tmp_path, monkeypatch):
    """Base and tuned model side by side, from the same noise where each is alone; then one step on what came of it."""
    bright = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    monkeypatch.setattr(synth_chunks, "load_reward", lambda name, *, device, seed: bright)
    (tmp_path / "prompts.txt").write_text("a circle\na square\n")
    words = f"""data synth --prompts {tmp_path / "prompts.txt"} --rewards random --steps 2 --guidance 1 --pictures 2
        --device cpu""".split()
    base, tuned = str(toys / "model"), str(finished)
    for out, models in (("both", [base, tuned]), ("base", [base]), ("tuned", [tuned])):
        flags = [word for name in models for word in ("--models", name)]
        assert cli.main([*words, *flags, "--out", str(tmp_path / out)]) == 0

    def levels(out):
        with Image.open(synth_chunks.synth_picture(tmp_path / out, 0, 0)) as picture:
            return np.asarray(picture).astype(int)

    # Alone a model draws both pictures of a prompt, so the batches differ, and with them the rounding of a few levels;
    # the short training moves many more.
    rounding, moved = (abs(levels(out) - levels("base")).mean() for out in ("both", "tuned"))
    assert rounding < 0.01 and moved > max(10 * rounding, 0.1)
    weights = json.loads((tmp_path / "both" / "report.json").read_text())["models"]
    assert weights[1]["weights"].startswith(weights[0]["weights"] + "+")
    rankings, _ = read_rankings(tmp_path / "both" / "rankings.parquet")
    assert {len(ranking.pictures) for ranking in rankings} == {2}
    data = tmp_path / "both" / "rankings.parquet"
    assert train(toys, tmp_path / "run", "--max_train_steps=1", "--train_batch_size=2", data=data) == 0
