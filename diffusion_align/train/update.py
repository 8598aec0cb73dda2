"""One optimizer step, once the gradients are there: averaged over processes, checked, clipped, taken or skipped.

Every loop of the package ends its step here, so what a bad number does is decided in one place and alike on every
process. With float16 the backward pass runs on a scaled loss; the scale is part of `Progress`, so it survives a resume.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from diffusion_align.train.processes.agree import anywhere

if TYPE_CHECKING:
    from accelerate import Accelerator

# Of the loss in float16, as torch.amp.GradScaler has them: a power of two, so scaling loses nothing.
FIRST_SCALE, GROWTH_STEPS, LEAST_SCALE = 2.0**16, 2000, 1.0
REMEMBERED, LEAST_NORMS = 128, 16  # gradient norms that a spike is told from, and how many that takes at least
_BUCKET = 2**25  # elements per all-reduce: 128 MiB of float32


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands; all a loop needs, besides weights and optimizer, to go on exactly.

    `loss_scale` is 0 where the loss is not scaled (float32, bfloat16); `scale_age` counts good steps since it changed.
    `halvings`: how often the pieces of a step were halved for want of memory. `in_round`: steps taken of a round whose
    data an earlier policy drew; 0 between rounds, and always offline. `norms`: gradient norms of the last good steps,
    kept where spikes are to be told from them.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    loss_scale: float = 0.0
    scale_age: int = 0
    halvings: int = 0
    in_round: int = 0
    norms: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepRecord:
    """One step: `loss` and `metrics` are means over the global batch; `updated` is False for a skipped step.

    `round`: in the middle of a round, what this process has of the round's data; a run cannot go on from here without.
    `ends`: the run is finished with this step, where only the loop can know.
    """

    step: int
    epoch: int
    loss: float
    metrics: dict[str, float] = field(repr=False)
    progress: Progress = field(repr=False)
    updated: bool = True
    round: Any = field(default=None, repr=False)
    ends: bool = False

    def row(self) -> dict[str, Any]:
        """The record as one flat row of metrics.jsonl."""
        return {"step": self.step, "epoch": self.epoch, "loss": self.loss, **self.metrics}


@dataclass(frozen=True)
class Outcome:
    """What became of a step: the gradient norm is that before clipping."""

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
    """Back-propagate a loss, times the loss scale where there is one."""
    (loss * progress.loss_scale if progress.loss_scale else loss).backward()


def update(
    losses: Tensor,
    progress: Progress,
    consumed: int,
    *,
    parameters: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    accelerator: "Accelerator",
    max_grad_norm: float | None,
    spike: float | None = None,
) -> Outcome:
    """Take the step that the parameters' gradients ask for, or skip it on every process if a number is not finite.

    `losses` are those of the whole global batch, alike on every process; `consumed` is how many samples it took. A
    skipped step leaves weights, optimizer and learning rate as they are. Gradients are freed in any case. With `spike`
    a step is skipped too whose gradient norm is so many standard deviations above the mean of the good steps before.
    """
    scale = progress.loss_scale
    norm = _mean_gradients(parameters, accelerator, 1 / scale if scale else 1.0)
    # Losses are gathered and gradients averaged, so all find the same; that they act alike is not left to that.
    loss_bad, norm_bad, jump = anywhere(
        accelerator,
        not bool(torch.isfinite(losses).all()),
        not bool(torch.isfinite(norm)),
        spike is not None and is_spike(float(norm), progress.norms, spike),
    )
    good = not (loss_bad or norm_bad or jump)
    rate = float(optimizer.param_groups[0]["lr"])
    if good:
        if max_grad_norm is not None:
            clip_grads_with_norm_(parameters, max_grad_norm, norm)
        optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    # A good loss whose scaled gradient overflows says that the scale is too high, not that the run is lost.
    overflow = not loss_bad and norm_bad and scale > LEAST_SCALE
    in_row = 0 if good else progress.skipped_in_row + (not overflow)
    scale, age = _next_scale(scale, progress.scale_age, good or jump)
    norms = (*progress.norms, float(norm))[-REMEMBERED:] if good and spike is not None else progress.norms
    progress = replace(
        progress, step=progress.step + 1, samples=progress.samples + consumed, skipped=progress.skipped + (not good),
        skipped_in_row=in_row, loss_scale=scale, scale_age=age, norms=norms,
    )  # fmt: skip
    return Outcome(progress, float(losses.mean()), float(norm), rate, good)


def is_spike(norm: float, norms: Sequence[float], deviations: float) -> bool:
    """Whether a gradient norm lies so many standard deviations above the mean of good ones; never while few are known.

    Norms of skipped steps are not remembered: a single nan among them would skip every step until it is forgotten.
    """
    return len(norms) >= LEAST_NORMS and norm > fmean(norms) + deviations * pstdev(norms)


def _next_scale(scale: float, age: int, finite: bool) -> tuple[float, int]:
    """Half the scale after a bad step, double it after `GROWTH_STEPS` good ones in a row; 0 stays 0."""
    if not scale:
        return 0.0, 0
    if not finite:
        return max(scale / 2, LEAST_SCALE), 0
    return (scale * 2, 0) if age + 1 == GROWTH_STEPS else (scale, age + 1)


def require_finite(outcome: Outcome, max_skipped_in_row: int) -> None:
    """Raise NonFiniteError once so many steps in a row were skipped; call it after the step's record is out."""
    p = outcome.progress
    if not outcome.updated and p.skipped_in_row >= max_skipped_in_row:
        bad = not (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm))
        raise NonFiniteError(
            f"steps {p.step - p.skipped_in_row + 1} to {p.step} each had a loss or gradient that is "
            f"{'not finite' if bad else 'a spike'} (loss {outcome.loss}, gradient norm {outcome.grad_norm}); the "
            "weights are still those before them. Lower the learning rate or beta"
            + (", or train in float32 or bfloat16" if bad else ", or raise --skip_spikes")
        )


def require_plain_tools(parameters: Sequence[Parameter], lr_scheduler: object, accelerator: "Accelerator") -> None:
    """Raise ValueError for parameters that do not train and for tools that would step or accumulate by themselves."""
    if not parameters or not all(parameter.requires_grad for parameter in parameters):
        raise ValueError("the parameters to train are empty, or some have requires_grad False")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("make the Accelerator without gradient_accumulation_steps: the loop itself accumulates")
    if type(lr_scheduler).__name__ == "AcceleratedScheduler":
        raise ValueError("give the plain scheduler: accelerate's would step once for every process")


def first_progress(mixed_precision: str) -> Progress:
    """Where a fresh run starts: with a loss scale in float16, without one in the wider types."""
    return Progress(loss_scale=FIRST_SCALE if mixed_precision == "fp16" else 0.0)


def _mean_gradients(parameters: Sequence[Parameter], accelerator: "Accelerator", factor: float) -> Tensor:
    """Average gradients over the processes, a bucket at a time, and times `factor`, in place; returns their norm."""
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
