"""The online verbs end to end at toy size: a run folder, an interruption, a plan, and bad input in one line."""

import json
import os
import signal
from importlib import import_module

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers_sdxl import make_tiny_sdxl_folder
from helpers_tiny import make_tiny_folder
from test_scripts import LORA, weights_of

from diffusion_align import cli
from diffusion_align.methods.shared import online_setup, rollouts
from diffusion_align.options import VERBS, options_of, resolve
from diffusion_align.rewards.controls import random_reward
from diffusion_align.rewards.step_aware_model import save_step_aware, start_step_aware
from diffusion_align.shapes import sample_captions
from diffusion_align.train import record

ONLINE = ("d3po", "spo", "prdp", "ddpo")


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A random model of 64-pixel pictures and six prompts of the embedded world."""
    folder = tmp_path_factory.mktemp("online")
    model = make_tiny_folder(folder / "model")
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    (folder / "prompts.txt").write_text("\n".join(sample_captions(6, 0, unique=True)))
    return folder


def argv(toys, name, run, *more, model="model"):
    flags = f"""train {name} --model {toys / model} --prompts {toys / "prompts.txt"} --output_dir {run} --device cpu
        --reward random --solver dpmpp --order 2 --steps 4 --guidance 2 --prompts_per_round 2 --sample_chunk 4
        --num_rounds 3 --learning_rate 1e-3 --checkpointing_steps 1 --validation_sampling_steps 2
        --validation_prompt circle""".split()
    own = {
        "spo": ["--start", "1", "--threshold", "0"],
        "prdp": ["--passes", "2"],
        "ddpo": ["--noise_window", "1"],
    }.get(name, [])
    return [*flags, *own, *more]


@pytest.mark.parametrize("name", ONLINE)
def test_a_run_that_is_interrupted_goes_on_as_if_it_never_stopped(toys, name, tmp_path, monkeypatch, capsys):
    """Ctrl-C in round 2, in PRDP's case between its two passes: then the round's data are saved too."""
    whole, cut, append = tmp_path / "whole", tmp_path / "cut", record.append
    assert cli.main(argv(toys, name, whole)) == 0
    rows = record.read(whole / "metrics.jsonl")
    passes = 2 if name == "prdp" else 1
    assert [row["step"] for row in rows] == list(range(1, 3 * passes + 1))
    assert all(row["dims"] == 4 * 16 * 16 and row["items"] > 0 for row in rows)
    metrics = import_module(f"diffusion_align.options.train.{name}").METRICS
    assert set().union(*rows) == {"step", "epoch", "threads", *metrics}
    AcceleratorState._reset_state(True)
    pipe = StableDiffusionPipeline.from_pretrained(toys / "model", safety_checker=None)
    pipe.load_lora_weights(whole)

    def ctrl_c(path, row):
        append(path, row)
        if row["step"] == passes + 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(record, "append", ctrl_c)
        assert cli.main(argv(toys, name, cut)) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"step {passes + 1} is saved; continue with: diffusion-align train {name} --config" in said
    AcceleratorState._reset_state(True)
    assert cli.main(said.partition("continue with: diffusion-align ")[2].split()) == 0
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert weights_of(cut) == weights_of(whole)


def test_spo_may_step_for_pairs_and_stop_between_them(toys, tmp_path, monkeypatch, capsys):
    """Two rounds with a noisy last step, 2 prompts x 3 pairs each, 4 pairs a step: two steps a round. Ctrl-C after the
    first: the rest of the round is learnt from when it goes on. The run is over after its rounds, wherever that is."""
    more = ("--final", "sigma_min", "--pairs_per_step", "4", "--num_rounds", "2", "--checkpointing_steps", "99")
    whole, cut, append = tmp_path / "whole", tmp_path / "cut", record.append
    assert cli.main(argv(toys, "spo", whole, *more)) == 0
    assert "steps            up to 4, up to 2 per round, of 4 pairs" in capsys.readouterr().out
    rows = record.read(whole / "metrics.jsonl")
    assert [row["items"] for row in rows] == [4, 2, 4, 2] and [row["samples"] for row in rows] == [0, 2, 2, 4]
    assert (whole / "checkpoints" / "step-00000004").is_dir() and (whole / "samples" / "step-00000004.png").exists()

    def ctrl_c(path, row):
        append(path, row)
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    AcceleratorState._reset_state(True)
    with monkeypatch.context() as patch:
        patch.setattr(record, "append", ctrl_c)
        assert cli.main(argv(toys, "spo", cut, *more)) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    AcceleratorState._reset_state(True)
    assert cli.main([*said.partition("continue with: diffusion-align ")[2].split(), "--final", "zero"]) == 1
    assert "final was 'sigma_min' and is now 'zero'" in capsys.readouterr().err.splitlines()[-1]
    AcceleratorState._reset_state(True)
    assert cli.main(said.partition("continue with: diffusion-align ")[2].split()) == 0
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert weights_of(cut) == weights_of(whole)


def test_a_run_that_ends_with_fewer_steps_than_planned_is_saved_where_it_ends(toys, tmp_path):
    """A threshold that keeps some pairs only: the last step is not the most that there can be. Scores are drawn by a
    picture's bits, so another processor draws others: here it keeps every second pair, and all eight nowhere."""
    more = ("--pairs_per_step", "1", "--num_rounds", "2", "--checkpointing_steps", "99", "--threshold", "0.3")
    assert cli.main(argv(toys, "spo", tmp_path / "run", *more)) == 0
    steps = len(record.read(tmp_path / "run" / "metrics.jsonl"))
    assert 2 <= steps < 2 * 2 * 2
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:08d}").is_dir()
    assert (tmp_path / "run" / "samples" / f"step-{steps:08d}.png").exists()


@pytest.mark.parametrize("name", ONLINE)
def test_every_online_method_runs_on_an_sdxl_format_folder(name, tmp_path):
    make_tiny_sdxl_folder(tmp_path / "xl")
    (tmp_path / "prompts.txt").write_text("a small red circle\na large blue square\n")
    assert cli.main(argv(tmp_path, name, tmp_path / "run", "--num_rounds", "1", model="xl")) == 0
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl")
    pipe.load_lora_weights(tmp_path / "run")
    assert (tmp_path / "run" / LORA).exists()


def test_window_options_without_a_window_cause_a_note(toys, tmp_path, capsys):
    for name in ONLINE:
        cli.main(argv(toys, name, tmp_path / "run", "--window_first", "1", "--noise_window", "none", "--dry-run"))
        assert "window_first has no effect" in capsys.readouterr().err


def test_full_training_runs_too(toys, tmp_path):
    assert cli.main(argv(toys, "d3po", tmp_path / "run", "--mode", "full", "--num_rounds", "1")) == 0
    assert (tmp_path / "run" / "unet").is_dir()
    assert record.read(tmp_path / "run" / "metrics.jsonl")[0]["log_ratio_w_p50"] == 0


@pytest.mark.parametrize("name", ONLINE)
def test_dry_run_says_what_will_happen_and_is_a_config(toys, name, tmp_path, capsys):
    assert cli.main(argv(toys, name, tmp_path / "run", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "# rounds           3, of 2 prompts" in said and "# latent dims D    1024" in said
    (tmp_path / "plan.yaml").write_text(said)
    assert cli.main(["train", name, "--config", str(tmp_path / "plan.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == said
    assert {"d3po": "[0.6832, 0.7032]", "spo": "[0.1261, 2.1328]", "prdp": "nats a step", "ddpo": "0.1024 nats"}[
        name
    ] in said


def test_the_plans_evaluations_are_those_of_the_issue(toys, tmp_path, capsys):
    """D3PO, two guided pictures, n steps: 4n rollout, 4n with gradient, 4n reference; the last step needs no score. Two
    less where the two pictures share their start; with noise in one step, what was counted in train/test_online.py."""

    def planned(name, *more):
        cli.main(argv(toys, name, tmp_path / "run", "--steps", "20", "--dry-run", *more))
        return capsys.readouterr().out

    apart = "--share_initial_noise=false"
    assert "80 rollout + 76 policy with gradient + 76 reference" in planned("d3po", apart)
    assert "78 rollout + 74 policy with gradient + 74 reference" in planned("d3po")
    assert "80 rollout + 152 policy with gradient + 152 without + 76 reference" in planned("prdp", apart)
    one = ("--steps", "6", "--guidance", "1", "--group_size", "4", "--noise_window", "1")
    said = planned("d3po", *one, "--window_first", "2", "--window_last", "2")
    assert "15 rollout + 2 policy with gradient + 2 reference" in said
    assert "6 steps, noise in 1 of them from step 2 on" in said
    said = planned("spo", "--steps", "6", "--guidance", "1", "--start", "2", "--children", "3", "--lookahead", "6")
    assert "21 rollout + 6 policy with gradient + 6 reference" in said
    few = ("--steps", "6", "--guidance", "1", "--children", "3", "--lookahead", "6", "--noise_window", "1")
    said = planned("spo", *few, "--window_first", "1", "--window_last", "3")
    assert "12 rollout + 2 policy with gradient + 2 reference" in said  # the mean of 14, 12 and 10
    assert "noise in 1 of them from step 1 .. 3 on" in said
    said = planned("d3po", *one, "--window_first", "1", "--window_last", "3", "--order", "1")
    assert "15 rollout + 1 policy with gradient + 1 reference" in said  # the mean of 18, 15 and 12


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--prompts", "{toys}/empty.txt"), "empty.txt: holds no prompt; give a .txt with one prompt a line"),
        (("--prompts", "{toys}/nowhere.txt"), "nowhere.txt"),
        (("--group_size", "1"), "rollout.group_size must be a whole number at least 2, not '1'"),
        (("--reward", "none"), "which reward? --reward NAME"),
        (("--sample_chunk", "1"), "must hold the 2 pictures of a prompt"),
        (("--prompts_per_step", "3"), "is not a multiple of"),
        (("--reward", "no/such/reward"), "neither a folder nor"),
        (("--solver", "ddim", "--eta", "2"), "eta of ddim is at most 1"),
        (("--noise_window", "4"), "a window of 4 of 4 steps starts at one of 0 .. -1, not at 0"),
        (
            ("--noise_window", "1", "--window_last", "3"),
            "a window of 1 of 4 steps starts at one of 0 .. 2, not at 0 .. 3",
        ),
        (("--noise_window", "1", "--learn_steps", "1"), "each say which steps to learn from: give one"),
    ],
)
def test_bad_input_is_one_line(toys, tmp_path, capsys, more, message):
    (toys / "empty.txt").write_text("\n \n")
    code = cli.main(argv(toys, "d3po", tmp_path / "run", *(word.format(toys=toys) for word in more)))
    said = capsys.readouterr().err.strip().splitlines()
    assert code != 0 and message in said[-1] and "Traceback" not in "".join(said)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: torch.full((len(prompts),), torch.nan), "no finite number for any of 4 pictures"),
        (lambda images, prompts: torch.ones(1), "the reward returned [1] for 4 pictures"),
        (lambda images, prompts: 1 / 0, "the reward failed: ZeroDivisionError"),
        (lambda images, prompts: torch.zeros(len(prompts)), "5 steps in a row had nothing to learn from: all pictures"),
    ],
)
def test_bad_rewards_are_one_line_and_nothing_done_is_lost(toys, tmp_path, capsys, monkeypatch, reward, message):
    calls = []

    def good_at_first(name, *, device, seed):
        def score(images, prompts):
            calls.append(0)
            good = torch.arange(len(prompts)).float()
            return good if len(calls) == 1 else reward(images, prompts)

        return score

    monkeypatch.setattr("diffusion_align.commands.train.train.load_reward", good_at_first)
    assert cli.main(argv(toys, "d3po", tmp_path / "run", "--num_rounds", "9")) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()


def test_a_threshold_that_filters_all_pairs_ends_the_run_with_advice(toys, tmp_path, capsys):
    assert cli.main(argv(toys, "spo", tmp_path / "run", "--threshold", "0.99", "--num_rounds", "9")) == 1
    assert "lower threshold" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_random_reward_is_the_same_for_the_same_picture():
    reward = random_reward(3)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    first = reward(images, ["a"] * 3)
    assert torch.equal(first[[2, 0]], reward(images[[2, 0]], ["b"] * 2)) and len(set(first.tolist())) == 3
    assert not torch.equal(first, random_reward(4)(images, ["a"] * 3))


def test_options_that_decide_what_is_drawn_are_part_of_a_runs_identity(toys, tmp_path, capsys):
    assert cli.main(argv(toys, "d3po", tmp_path / "run", "--num_rounds", "1")) == 0
    other = tmp_path / "other.txt"
    other.write_text("a small red circle on a gray background\n")
    for more in (
        ("--prompts", str(other)),
        ("--beta", "9"),
        ("--group_size", "3"),
        ("--reward", "judge"),
        ("--eta", "0.5"),
    ):
        AcceleratorState._reset_state(True)
        assert cli.main(argv(toys, "d3po", tmp_path / "run", "--resume", "latest", *more)) == 1
        assert more[0].removeprefix("--") in capsys.readouterr().err.splitlines()[-1]


def test_presets_need_only_prompts():
    for name in ONLINE:
        record_of = VERBS[f"train {name}"]
        options = resolve(record_of.options, record_of.words, preset="tiny", settings=[]).options
        record_of.check(options)
        assert options.prompts == "tiny" and "beta" in options_of(record_of.options) or name == "ddpo"


def test_spo_is_guided_by_a_step_aware_model(toys, tmp_path):
    """At its start such a model scores as the plain reward times its logit scale, so it chooses the same children."""
    save_step_aware(start_step_aware("tiny", device="cpu"), tmp_path / "spm")
    for run, more in (("aware", ("--preference_model", str(tmp_path / "spm"))), ("plain", ("--reward", "tiny"))):
        assert cli.main(argv(toys, "spo", tmp_path / run, "--num_rounds", "1", *more)) == 0
        AcceleratorState._reset_state(True)
    aware, plain = (record.read(tmp_path / run / "metrics.jsonl")[0] for run in ("aware", "plain"))
    scale = aware["score_mean"] / plain["score_mean"]
    assert scale > 1 and aware["items"] == plain["items"]
    assert aware["gap"] == pytest.approx(scale * plain["gap"], rel=0.05)
    assert aware["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.05)


def test_the_collapse_alarm_warns_or_stops_with_a_checkpoint(toys, tmp_path, capsys, monkeypatch):
    """Pictures that differ by less each round: six rounds, of which the first five are what the sixth is judged by."""
    real, rounds = rollouts.round_columns, iter([1.0, 1.0, 1.0, 1.0, 1.0, 0.3, 0.3, 0.3] * 2)
    monkeypatch.setattr(
        rollouts, "round_columns", lambda runs: real(runs) | {"diversity": torch.tensor([next(rounds)])}
    )
    more = ("--num_rounds", "8", "--collapse_patience", "1", "--prompts_per_round", "2", "--checkpointing_steps", "9")
    assert cli.main(argv(toys, "d3po", tmp_path / "warned", *more)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "collapse?" in line]
    assert len(said) == 1 and "step 6: the pictures of a prompt differ by 0.3" in said[0]
    AcceleratorState._reset_state(True)
    assert cli.main(argv(toys, "d3po", tmp_path / "stopped", *more, "--collapse_alarm", "stop")) == 1
    assert "stopped, and saved, at step 6: the pictures of a prompt differ" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "stopped" / "checkpoints" / "step-00000006").is_dir()
    assert len(record.read(tmp_path / "stopped" / "metrics.jsonl")) == 6


def test_a_noise_window_has_one_place_a_round_and_another_in_the_next(toys, tmp_path, monkeypatch):
    """Whatever the chunk: two prompts a round, one or both in the network."""
    real, seen = online_setup.draw_runs, []

    def spy(policy, reference, table, *rest, **more):
        seen.append(table.stochastic.nonzero().flatten().tolist())
        return real(policy, reference, table, *rest, **more)

    monkeypatch.setattr(online_setup, "draw_runs", spy)
    window = "--steps 5 --noise_window 2 --window_first 1 --num_rounds 6 --checkpointing_steps 9".split()
    assert cli.main(argv(toys, "d3po", tmp_path / "whole", *window)) == 0
    whole, seen[:] = list(seen), []
    assert len(whole) == 6 and sorted(set(map(tuple, whole))) == [(1, 2), (2, 3)]
    AcceleratorState._reset_state(True)
    assert cli.main(argv(toys, "d3po", tmp_path / "halves", *window, "--sample_chunk", "2")) == 0
    assert seen[::2] == seen[1::2] == whole
