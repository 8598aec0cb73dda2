"""What a run does when something goes wrong around it: the real command, on a random model."""

import json
import os
import signal

import pytest
import torch
from stress.runs import differences, end_of, flags, make_world, stop_at, train

from diffusion_align.commands import versions
from diffusion_align.commands.interrupt import Interrupted, Interruptible
from diffusion_align.commands.train import session
from diffusion_align.commands.train.best import Best
from diffusion_align.methods import dpo
from diffusion_align.train import record
from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.checkpoints.store import CheckpointError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def steps_of(run):
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").iterdir())]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_with_its_number(world, tmp_path, number):
    code, said = train(flags(world, "d3po", tmp_path / "run"), stop_at(2, number))
    assert code == 128 + number and "step 2 is saved; continue with: diffusion-align train d3po" in said
    assert end_of(tmp_path / "run")[0].state["progress"]["in_round"] == 2


def test_a_second_signal_ends_at_once_and_says_that_nothing_was_saved():
    with pytest.raises(Interrupted, match="nothing saved since") as caught, Interruptible(grace=0) as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal_number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGUSR1)
    assert caught.value.number == signal.SIGUSR1


def test_a_signal_while_a_round_is_drawn_does_not_wait_for_it(world, tmp_path, monkeypatch):
    """In the second round, behind its first chunk: what is saved is the end of the first, and the end is the same."""
    whole, cut, real = tmp_path / "whole", tmp_path / "cut", session.Session.stop_requested
    assert train(flags(world, "prdp", whole))[0] == 0
    asked = []

    def listening(self):
        asked.append(0)
        if len(asked) == 3:  # two chunks a round
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "stop_requested", listening)
        code, said = train(flags(world, "prdp", cut, "--sample_chunk=4"))
    assert code == 143 and "step 4 is saved" in said and len(asked) == 3
    assert train(flags(world, "prdp", cut, "--resume=latest"))[0] == 0
    assert list(differences(cut, end_of(whole))) == []


def test_numbers_that_stay_bad_end_the_run_with_its_state_saved(world, tmp_path, monkeypatch):
    calls, real = [], dpo.margin_of

    def from_step_4(pairs):
        calls.append(0)
        return real(pairs) * (torch.nan if len(calls) > 3 else 1)

    monkeypatch.setattr("diffusion_align.methods.shared.pair_losses.margin_of", from_step_4)
    code, said = train(flags(world, "dpo", tmp_path / "run"))
    assert code == 1 and "steps 4 to 8 each had a loss or gradient that is not finite" in said
    found, _ = end_of(tmp_path / "run")
    assert found.step == 8 and found.state["progress"]["skipped_in_row"] == 5
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors["model"].values())


def test_a_failed_save_is_reported_and_training_continues(world, tmp_path, monkeypatch):
    real = checkpoint.save

    def full(folder, step, *args, **more):
        if step == 4:
            raise CheckpointError("step-00000004: could not be saved (No space left on device)")
        return real(folder, step, *args, **more)

    monkeypatch.setattr(checkpoint, "save", full)
    said = []
    monkeypatch.setattr(session.logger, "warning", lambda text, *args: said.append(text % args))
    assert train(flags(world, "dpo", tmp_path / "run", "--checkpointing_steps=4"))[0] == 0
    assert steps_of(tmp_path / "run") == [8, 12] and "No space left on device); the training continues" in said[0]


def test_a_failed_metrics_row_is_reported_and_training_continues(world, tmp_path, monkeypatch):
    real, said = record.append, []

    def full(path, row):
        if row["step"] == 3:
            raise OSError(28, "No space left on device")
        real(path, row)

    monkeypatch.setattr(record, "append", full)
    monkeypatch.setattr(record.logger, "warning", lambda text, *args: said.append(text % args))
    assert train(flags(world, "dpo", tmp_path / "run"))[0] == 0
    assert [row["step"] for row in record.read(tmp_path / "run" / "metrics.jsonl")] == [1, 2, *range(4, 13)]
    assert "step 3 could not be written" in said[0] and "1 rows up to step 3 are missing" in said[1]


def test_the_best_and_the_resumed_from_are_kept(world, tmp_path):
    """Of checkpoints every 2 steps only the newest is kept, beside the one before which the loss was lowest."""
    run, more = tmp_path / "run", ["--checkpointing_steps=2", "--checkpoints_total_limit=1", "--keep_best=-loss"]
    assert train(flags(world, "dpo", run, *more))[0] == 0
    losses = [row["loss"] for row in record.read(run / "metrics.jsonl")]
    means = [(losses[i] + losses[i + 1]) / 2 for i in range(0, 12, 2)]
    best = 2 * (means.index(min(means)) + 1)
    assert steps_of(run) == sorted({best, 12}) and end_of(run)[0].state["best"]["step"] == best
    run = tmp_path / "again"
    more = ["--checkpointing_steps=2", "--checkpoints_total_limit=1"]
    assert train(flags(world, "dpo", run, *more), stop_at(5))[0] == 143
    assert steps_of(run) == [5]
    assert train(flags(world, "dpo", run, *more, "--resume=latest"))[0] == 0
    assert steps_of(run) == [5, 12]


def test_an_unknown_metric_is_named_with_those_there_are(world, tmp_path):
    code, said = train(flags(world, "dpo", tmp_path / "run", "--keep_best=rewards"))
    assert code == 2 and "keep_best: this method writes no metric 'rewards'; there are loss, grad_norm" in said
    with pytest.raises(ValueError, match="--keep_best rewards: this run has no such metric; it has loss, lr"):
        Best("rewards").observe({"loss": 0.0, "lr": 1.0})  # a loop of one's own


def test_the_best_is_judged_by_means_between_checkpoints():
    best = Best("reward")
    for value, step, expected in ((1.0, 1, 1), (3.0, 2, 2), (float("nan"), 3, 2), (2.0, 4, 2), (4.0, 5, 5)):
        best.observe({"reward": value})
        best.accept(best.updated(step))
        assert best.state["step"] == expected
    assert Best("other", best.state).state is None and Best("reward", best.state).state == best.state
    assert Best(None).updated(1) is None
    best.observe({"loss": float("nan")})  # a step with nothing to learn from lacks the metric
    with pytest.raises(ValueError, match="no such metric"):
        best.observe({"loss": 1.0})


def test_another_version_of_torch_causes_a_warning_only(world, tmp_path, monkeypatch):
    run, said = tmp_path / "run", []
    assert train(flags(world, "dpo", run), stop_at(3))[0] == 143
    newer = versions.versions() | {"torch": "9.9"}
    monkeypatch.setattr(versions, "versions", lambda: newer)
    monkeypatch.setattr(versions.logger, "warning", lambda text, *args: said.append(text % args))
    assert train(flags(world, "dpo", run, "--resume=latest"))[0] == 0
    assert len(said) == 1 and "and continues with 9.9" in said[0]


def test_halvings_are_logged_and_survive_a_resume(world, tmp_path, monkeypatch):
    from diffusion_align.models import TextToImage

    real, left = TextToImage.predict, [1]

    def short(self, x, t, text):
        if torch.is_grad_enabled() and len(x) == 8 and left.pop():
            left.append(0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, x, t, text)

    run = tmp_path / "run"
    monkeypatch.setattr(TextToImage, "predict", short)
    assert train(flags(world, "dpo", run), stop_at(2))[0] == 143
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["halvings"] == 1
    left[:] = [1]  # would run out again, were it asked
    assert train(flags(world, "dpo", run, "--resume=latest"))[0] == 0
    assert [row["halvings"] for row in record.read(run / "metrics.jsonl")] == [1] * 12 and left == [1]
