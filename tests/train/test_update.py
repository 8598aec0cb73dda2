"""The end of every step: loss scaling in float16, and what a bad number does to it."""

import pytest
import torch
from accelerate import Accelerator
from helpers_train import make_run

from diffusion_align.train import update as update_module
from diffusion_align.train.run import FIRST_SCALE, Progress, Run, first_progress
from diffusion_align.train.update import NonFiniteError, update


def test_a_loss_scale_changes_no_bit_and_is_carried_along():
    """A power of two moves exponents only, so weights and norms are those of the unscaled run."""
    plain, scaled = make_run(), make_run()
    rows = list(plain.steps())
    with_scale = list(scaled.steps(Progress(loss_scale=1024.0)))
    for a, b in zip(rows, with_scale, strict=True):
        assert (a.loss, a.metrics["grad_norm"]) == (b.loss, b.metrics["grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(plain.weights().values(), scaled.weights().values(), strict=True))
    assert with_scale[-1].metrics["loss_scale"] == 1024 and "loss_scale" not in rows[-1].metrics
    assert with_scale[-1].progress.scale_age == len(rows)


class OneWeight:
    """A weight whose next gradient is set by hand, as float16 would have made it."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)

    def step(self, gradient, progress, loss=1.0, spike=None):
        self.weight.grad = torch.tensor([gradient])
        return update(torch.tensor([loss]), self.run(spike), progress, 4)

    def run(self, spike=None, limit=5):
        accelerator = Accelerator(cpu=True)
        return Run(
            [self.weight], self.optimizer, None, accelerator, 0, 1, max_grad_norm=None, spike=spike,
            max_skipped_in_row=limit,
        )  # fmt: skip


def test_an_overflow_halves_the_loss_scale_and_counts_as_no_failure():
    one, progress = OneWeight(), Progress(loss_scale=8.0)
    outcome = one.step(float("inf"), progress)
    assert (outcome.updated, outcome.progress.loss_scale, outcome.progress.skipped) == (False, 4.0, 1)
    assert outcome.progress.skipped_in_row == 0 and one.weight.item() == 0
    outcome = one.step(4.0, outcome.progress)
    assert outcome.updated and one.weight.item() == -1.0 and outcome.grad_norm == 1.0
    update_module.require_finite(outcome, one.run(limit=1))


def test_a_bad_loss_or_a_scale_at_its_end_is_a_failure():
    one = OneWeight()
    outcome = one.step(1.0, Progress(loss_scale=8.0), loss=float("nan"))
    assert outcome.progress.skipped_in_row == 1
    outcome = one.step(float("inf"), Progress(loss_scale=1.0))
    assert outcome.progress.skipped_in_row == 1 and outcome.progress.loss_scale == 1.0
    with pytest.raises(NonFiniteError):
        update_module.require_finite(outcome, one.run(limit=1))


def test_good_steps_double_the_scale(monkeypatch):
    monkeypatch.setattr(update_module, "GROWTH_STEPS", 3)
    one, progress = OneWeight(), Progress(loss_scale=8.0)
    scales = []
    for gradient in (1.0, 1.0, 1.0, 1.0, float("inf"), 1.0):
        progress = one.step(gradient, progress).progress
        scales.append(progress.loss_scale)
    assert scales == [8, 8, 16, 16, 8, 8]


def test_only_float16_starts_with_a_scale():
    assert first_progress("fp16").loss_scale == FIRST_SCALE and first_progress("bf16") == Progress()


def test_a_spike_is_skipped_and_only_that_one():
    """Norms of 1 and 3 in turn: mean 2, deviation 1. At 5 deviations 6.9 passes and 7.5 does not."""
    one, progress = OneWeight(), Progress()
    for i in range(20):
        progress = one.step(1.0 + 2 * (i % 2), progress, spike=5.0).progress
    assert len(progress.norms) == 20 and progress.skipped == 0
    weight = one.weight.item()
    outcome = one.step(7.5, progress, spike=5.0)
    assert not outcome.updated and outcome.progress.skipped == 1 and outcome.progress.norms == progress.norms
    assert one.weight.item() == weight
    assert one.step(6.9, outcome.progress, spike=5.0).updated
    assert one.step(7.5, progress).updated  # nobody asked


def test_a_nan_causes_no_further_skips():
    """A single one, in rolling statistics, has skipped 129 steps of a public optimizer."""
    one, progress = OneWeight(), Progress()
    updated = []
    for i in range(60):
        outcome = one.step(float("nan") if i == 30 else 1.0 + i % 3, progress, spike=6.0)
        progress = outcome.progress
        updated.append(outcome.updated)
    assert updated.count(False) == 1 and not updated[30]


def test_spikes_wait_for_enough_norms_and_forget_old_ones(monkeypatch):
    one, progress = OneWeight(), Progress()
    for gradient in (1.0, 1.0, 100.0):
        progress = one.step(gradient, progress, spike=1.0).progress
    assert progress.skipped == 0
    monkeypatch.setattr(update_module, "REMEMBERED", 2)
    assert one.step(5.0, progress, spike=1.0).progress.norms == (100.0, 5.0)


def test_repeated_spikes_end_the_run_with_the_reason():
    one, progress = OneWeight(), Progress(norms=(1.0, 2.0) * 10)
    for _ in range(3):
        outcome = one.step(50.0, progress, spike=5.0)
        progress = outcome.progress
    with pytest.raises(NonFiniteError, match="a spike .*skip_spikes"):
        update_module.require_finite(outcome, one.run(limit=3))
