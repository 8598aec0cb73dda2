"""The engine of online rounds: stream, passes, resume, processes, and steps with nothing in them."""

import json

import pytest
import torch
from helpers_online import METHODS, Toy, darkness
from helpers_train import in_processes
from safetensors.torch import load_file, save_file

from diffusion_align.rewards import RewardError
from diffusion_align.train.rounds import NothingToLearn
from diffusion_align.train.run import Progress


def test_rounds_steps_and_passes():
    toy = Toy()
    records = list(toy.rounds(toy.method("d3po"), prompts_per_step=2, passes=2, max_steps=8))
    assert [r.step for r in records] == list(range(1, 9))
    assert [r.round is None for r in records] == [False, False, False, True] * 2
    assert [r.progress.samples for r in records] == [0, 0, 0, 4, 4, 4, 4, 8]
    # The second pass meets a policy that has moved off the runs.
    assert records[0].metrics["drift"] == 0 and records[2].metrics["drift"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_stopping_between_rounds_changes_nothing(name):
    whole = Toy()
    rows = list(whole.rounds(whole.method(name), max_steps=4))
    cut = Toy()
    first = list(cut.rounds(cut.method(name), max_steps=2))
    second = list(cut.rounds(cut.method(name), progress=first[-1].progress, max_steps=4))
    assert [r.row() for r in first + second] == [r.row() for r in rows]
    assert all(torch.equal(a, b) for a, b in zip(whole.weights(), cut.weights(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_chunks_change_only_the_rounding(name):
    """Also where one group is tied: it counts for nothing, whichever chunk it is in."""
    ends = []

    def tied_for_one(latents, prompts):
        values = darkness(latents, prompts)
        return torch.where(torch.tensor([prompt == "prompt 2" for prompt in prompts]), 0.0, values)

    for chunk in (1, 2, 4):
        toy = Toy(double=True, reward=tied_for_one)
        more = {"kl_weight": 0.1} if name == "ddpo" else {}
        list(toy.rounds(toy.method(name, **more), prompts_per_chunk=chunk))
        ends.append(torch.cat([w.flatten() for w in toy.weights()]))
    # States are float32, so an ulp of them that hangs on the size of a chunk may go through the steps that follow.
    start = torch.cat([w.flatten() for w in Toy(double=True).weights()])
    moved = (ends[0] - start).abs().max().item()
    assert moved > 0.1
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-3 * moved)
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-3 * moved)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one(name, tmp_path):
    one = Toy(double=True)
    rows = list(one.rounds(one.method(name), prompts_per_chunk=1))

    def work(rank):
        from accelerate import Accelerator

        toy = Toy(double=True)
        records = list(toy.rounds(toy.method(name), prompts_per_chunk=1, accelerator=Accelerator(cpu=True)))
        save_file({str(i): weight for i, weight in enumerate(toy.weights())}, tmp_path / f"{rank}.safetensors")
        (tmp_path / f"{rank}.json").write_text(json.dumps([r.row() for r in records]))

    assert in_processes(2, work)
    for rank in (0, 1):
        weights = load_file(tmp_path / f"{rank}.safetensors")
        for i, a in enumerate(one.weights()):
            torch.testing.assert_close(a, weights[str(i)], rtol=1e-6, atol=1e-9)
        for a, b in zip(rows, json.loads((tmp_path / f"{rank}.json").read_text()), strict=True):
            assert b == pytest.approx(a.row(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_rounds_of_ties_are_skipped_and_then_end_the_run(name):
    toy = Toy(reward=lambda latents, prompts: torch.ones(len(prompts)))
    before, records = toy.weights(), []
    with pytest.raises(NothingToLearn, match="3 steps in a row had nothing to learn"):
        for record in toy.rounds(toy.method(name), max_steps=9, max_skipped_in_row=3):
            records.append(record)
    assert [r.metrics["skipped"] for r in records] == [1, 2, 3] and not any(r.updated for r in records)
    assert all(torch.equal(a, b) for a, b in zip(before, toy.weights(), strict=True))


def test_one_empty_round_is_passed_over():
    calls = []

    def tied_at_first(latents, prompts):
        calls.append(0)
        return torch.zeros(len(prompts)) if len(calls) <= 2 else darkness(latents, prompts)

    toy = Toy(reward=tied_at_first)
    records = list(toy.rounds(toy.method("d3po"), max_steps=3))
    assert [r.updated for r in records] == [False, True, True] and [r.metrics["items"] for r in records] == [0, 4, 4]
    # The check of the start waits for the first update.
    assert records[1].metrics["log_ratio_w_p50"] == 0


@pytest.mark.parametrize("name", ["prdp", "spo"])
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x, p: torch.full((len(p),), float("nan")), "no finite number for any of N pictures"),
        (lambda x, p: torch.tensor(1.0), r"returned \[\] for N pictures: expected \[N\]"),
        (lambda x, p: torch.ones(3), r"returned \[3\] for N pictures"),
        (lambda x, p: [1.0] * len(p), "returned list for N pictures"),
        (lambda x, p: 1 / 0, "the reward failed: ZeroDivisionError: division by zero"),
    ],
)
def test_invalid_rewards_are_refused(name, reward, message):
    """Two prompts a chunk: with two pictures each, or SPO's three children."""
    toy = Toy(reward=reward)
    with pytest.raises(RewardError, match=message.replace("N", "6" if name == "spo" else "4")):
        next(toy.rounds(toy.method(name)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "no prompts"),
        ({"prompts_per_step": 3}, r"prompts per round \(4\) must be a multiple of prompts per step \(3\)"),
        ({"passes": 0}, "must be positive"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    toy = Toy()
    with pytest.raises(ValueError, match=message):
        next(toy.rounds(toy.method("d3po"), **settings))


def test_progress_of_a_finished_run_does_nothing():
    toy = Toy()
    assert list(toy.rounds(toy.method("d3po"), progress=Progress(step=3, samples=12))) == []


@pytest.mark.parametrize("name", METHODS)
def test_all_of_a_chunk_moves_to_another_device(name):
    """`meta`, a device without memory, stands for the GPU; rewards stay, as selection is done on the CPU."""
    toy = Toy()
    away = toy.method(name).collect([(0, 1), (0, 4)]).to("meta")
    if name == "spo":
        moved = [away.before, away.parent, away.child, away.k, away.text, away.gap, away.family, away.final]
    else:
        moved = [away.trajectory.states, away.trajectory.clean, away.trajectory.log_prob, away.reference, away.text]
        assert away.reward.device.type == "cpu"
    assert {tensor.device.type for tensor in moved} == {"meta"}
