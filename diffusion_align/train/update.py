"""One optimizer step, once the gradients are there: averaged over processes, checked, clipped, taken or skipped.

Every loop of the package ends its step here, so what a bad number does is decided in one place and alike on every
process. With float16 the backward pass runs on a scaled loss; the scale is part of `Progress`, so it survives a resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

if TYPE_CHECKING:
    from accelerate import Accelerator

# Of the loss in float16, as torch.amp.GradScaler has them: a power of two, so scaling loses nothing.
FIRST_SCALE, GROWTH_STEPS, LEAST_SCALE = 2.0**16, 2000, 1.0
_BUCKET = 2**25  # elements per all-reduce: 128 MiB of float32


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands; all a loop needs, besides weights and optimizer, to go on exactly.

    `loss_scale` is 0 where the loss is not scaled (float32, bfloat16); `scale_age` counts good steps since it changed.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    loss_scale: float = 0.0
    scale_age: int = 0


@dataclass(frozen=True)
class StepRecord:
    """One step: `loss` and `metrics` are means over the global batch; `updated` is False for a skipped step.

    `resumable` says whether a run can go on exactly from here: in the middle of what an old policy drew, it cannot.
    """

    step: int
    epoch: int
    loss: float
    metrics: dict[str, float] = field(repr=False)
    progress: Progress = field(repr=False)
    updated: bool = True
    resumable: bool = True

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
        scale = {"loss_scale": p.loss_scale} if p.loss_scale else {}
        return {
            "grad_norm": self.grad_norm, "lr": self.learning_rate, "samples": p.samples, "skipped": p.skipped, **scale
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
) -> Outcome:
    """Take the step that the parameters' gradients ask for, or skip it on every process if a number is not finite.

    `losses` are those of the whole global batch, alike on every process; `consumed` is how many samples it took. A
    skipped step leaves weights, optimizer and learning rate as they are. Gradients are freed in any case.
    """
    scale = progress.loss_scale
    norm = _mean_gradients(parameters, accelerator, 1 / scale if scale else 1.0)
    # Losses are gathered and gradients averaged, so every process decides the same.
    loss_finite, norm_finite = bool(torch.isfinite(losses).all()), bool(torch.isfinite(norm))
    finite = loss_finite and norm_finite
    rate = float(optimizer.param_groups[0]["lr"])
    if finite:
        if max_grad_norm is not None:
            clip_grads_with_norm_(parameters, max_grad_norm, norm)
        optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    # A good loss whose scaled gradient overflows says that the scale is too high, not that the run is lost.
    overflow = loss_finite and not norm_finite and scale > LEAST_SCALE
    in_row = 0 if finite else progress.skipped_in_row + (not overflow)
    scale, age = _next_scale(scale, progress.scale_age, finite)
    progress = Progress(
        progress.step + 1, progress.samples + consumed, progress.skipped + (not finite), in_row, scale, age
    )
    return Outcome(progress, float(losses.mean()), float(norm), rate, finite)


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
        raise NonFiniteError(
            f"steps {p.step - p.skipped_in_row + 1} to {p.step} each had a loss or gradient "
            f"that is not finite (loss {outcome.loss}, gradient norm {outcome.grad_norm}); the weights are still those "
            "before them. Lower the learning rate or beta, or train in float32 or bfloat16"
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
