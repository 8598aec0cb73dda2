"""One optimizer step from given gradients: average over ranks, check, clip, then step or skip.

Both engines end a step here, so one place decides, for all ranks, what happens to values that are not finite. With
float16 the backward pass runs on a scaled loss; the scale is part of `Progress`, so a resumed run keeps it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from diffusion_align.train.processes.agree import on_any_rank
from diffusion_align.train.run import Progress, Run

if TYPE_CHECKING:
    from accelerate import Accelerator

GROWTH_STEPS, LEAST_SCALE = 2000, 1.0  # of the loss scale in float16, as in torch.amp.GradScaler
REMEMBERED, LEAST_NORMS = 128, 16  # gradient norms that spikes are compared with: how many are kept, and the fewest
_BUCKET = 2**25  # elements per all-reduce: 128 MiB of float32


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


@dataclass(frozen=True)
class Outcome:
    """The result of a step; the gradient norm is the one before clipping."""

    progress: Progress
    loss: float
    grad_norm: float
    learning_rate: float
    updated: bool

    def metrics(self) -> dict[str, float]:
        p = self.progress
        more = {"loss_scale": p.loss_scale, "halvings": p.halvings}
        return {
            "grad_norm": self.grad_norm, "lr": self.learning_rate, "samples": p.samples, "skipped": p.skipped,
            **{name: float(value) for name, value in more.items() if value},
        }  # fmt: skip


def scaled_backward(loss: Tensor, progress: Progress) -> None:
    """Back-propagate a loss, times the loss scale if there is one."""
    (loss * progress.loss_scale if progress.loss_scale else loss).backward()


def update(losses: Tensor, run: Run, progress: Progress, consumed: int) -> Outcome:
    """Apply the gradients of the parameters, or skip the step on all ranks if a value is not finite.

    A skipped step changes neither weights nor optimizer nor learning rate. Gradients are freed in any case. With
    `run.spike` a step whose gradient norm is a spike (`is_spike`) is skipped as well.

    Args:
        losses: of the global batch, equal on all ranks.
        progress: where the run stands before the step; `run.progress` is where it started.
        consumed: samples that the step used.
    """
    scale = progress.loss_scale
    norm = _mean_gradients(run.parameters, run.accelerator, 1 / scale if scale else 1.0)
    # Losses are gathered and gradients averaged, so all ranks should find the same; the reduction guarantees it.
    loss_bad, norm_bad, jump = on_any_rank(
        run.accelerator,
        not bool(torch.isfinite(losses).all()),
        not bool(torch.isfinite(norm)),
        run.spike is not None and is_spike(float(norm), progress.norms, run.spike),
    )
    good = not (loss_bad or norm_bad or jump)
    rate = float(run.optimizer.param_groups[0]["lr"])
    if good:
        if run.max_grad_norm is not None:
            clip_grads_with_norm_(run.parameters, run.max_grad_norm, norm)
        run.optimizer.step()
        if run.lr_scheduler is not None:
            run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    # If the loss is finite and its scaled gradient is not, the scale is too high: that is no failure of the run.
    overflow = not loss_bad and norm_bad and scale > LEAST_SCALE
    in_row = 0 if good else progress.skipped_in_row + (not overflow)
    scale, age = _next_scale(scale, progress.scale_age, good or jump)
    norms = (*progress.norms, float(norm))[-REMEMBERED:] if good and run.spike is not None else progress.norms
    progress = replace(
        progress, step=progress.step + 1, samples=progress.samples + consumed, skipped=progress.skipped + (not good),
        skipped_in_row=in_row, loss_scale=scale, scale_age=age, norms=norms,
    )  # fmt: skip
    return Outcome(progress, float(losses.mean()), float(norm), rate, good)


def is_spike(norm: float, norms: Sequence[float], deviations: float) -> bool:
    """Whether a gradient norm lies `deviations` standard deviations above the mean of `norms`; False if these are few.

    `norms` holds no norm of a skipped step: one nan among them would make every later step a spike.
    """
    return len(norms) >= LEAST_NORMS and norm > fmean(norms) + deviations * pstdev(norms)


def _next_scale(scale: float, age: int, finite: bool) -> tuple[float, int]:
    """Halve the scale after a bad step, double it after `GROWTH_STEPS` good ones in a row; 0 stays 0."""
    if not scale:
        return 0.0, 0
    if not finite:
        return max(scale / 2, LEAST_SCALE), 0
    return (scale * 2, 0) if age + 1 == GROWTH_STEPS else (scale, age + 1)


def require_finite(outcome: Outcome, run: Run) -> None:
    """Raise NonFiniteError after `run.max_skipped_in_row` skipped steps; call it after yielding the step's record."""
    p = outcome.progress
    if not outcome.updated and p.skipped_in_row >= run.max_skipped_in_row:
        bad = not (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm))
        raise NonFiniteError(
            f"steps {p.step - p.skipped_in_row + 1} to {p.step} each had a loss or gradient that is "
            f"{'not finite' if bad else 'a spike'} (loss {outcome.loss}, gradient norm {outcome.grad_norm}); the "
            "weights are still those before these steps. Lower the learning rate or beta"
            + (", or train in float32 or bfloat16" if bad else ", or raise skip_spikes")
        )


def _mean_gradients(parameters: Sequence[Parameter], accelerator: "Accelerator", factor: float) -> Tensor:
    """Average gradients over the ranks, a bucket at a time, and multiply them by `factor`, in place; their norm."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise ValueError("no parameter received a gradient: is the policy computed with gradients on?")
    if accelerator.num_processes > 1:
        bucket: list[Tensor] = []
        for i, gradient in enumerate(gradients):
            bucket.append(gradient)
            last = i + 1 == len(gradients) or gradients[i + 1].dtype != gradient.dtype
            if last or sum(g.numel() for g in bucket) >= _BUCKET:
                mean = accelerator.reduce(torch.cat([g.flatten() for g in bucket]), "mean")
                assert isinstance(mean, Tensor)
                for g, values in zip(bucket, mean.split([g.numel() for g in bucket]), strict=True):
                    g.copy_(values.view_as(g))
                bucket = []
    if factor != 1.0:
        torch._foreach_mul_(gradients, factor)
    return get_total_norm(gradients)
