"""A run as both engines take it: parameters, optimizer, settings, and the point where it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter

if TYPE_CHECKING:
    from accelerate import Accelerator

FIRST_SCALE = 2.0**16  # loss scale in float16, as in torch.amp.GradScaler: scaling by a power of two is exact


@dataclass(frozen=True)
class Progress:
    """Where a run stands: with weights and optimizer, all that a loop needs to continue exactly.

    `loss_scale` is 0 if the loss is not scaled (float32, bfloat16); `scale_age` counts good steps since it changed.
    `halvings`: how often micro-batches or chunks were halved because memory ran out. `in_round`: steps taken in the
    current round; 0 between rounds and in offline training. `norms`: gradient norms of the last good steps, kept only
    if spikes are skipped.
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


def first_progress(mixed_precision: str) -> Progress:
    """Where a fresh run starts: with a loss scale in float16, without one in the wider types."""
    return Progress(loss_scale=FIRST_SCALE if mixed_precision == "fp16" else 0.0)


@dataclass(frozen=True, eq=False)
class Run:
    """What the engines need of a run, whatever its method.

    optimizer, lr_scheduler: plain torch objects; those of accelerate would step once for each process.
    accelerator: made without gradient_accumulation_steps. The engine averages gradients itself, so the model must not
        be wrapped for distributed training.
    seed: part of the address of every random draw.
    max_steps: the optimizer step at which the run ends.
    progress: where to continue; the default starts a fresh run.
    max_grad_norm: clip the total gradient norm to this; None: no clipping.
    spike: skip steps whose gradient norm is this many standard deviations above the mean of the last good steps.
    max_skipped_in_row: end the run after this many skipped steps in a row.
    round: if `progress` is inside a round, its data on this rank (from the checkpoint).
    stop_requested: returns whether this process got a signal to stop; an online loop checks it while it draws.
    """

    parameters: Sequence[Parameter]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None
    accelerator: Accelerator
    seed: int
    max_steps: int
    progress: Progress = field(default_factory=Progress)
    max_grad_norm: float | None = 1.0
    spike: float | None = None
    max_skipped_in_row: int = 5
    round: Any = None
    stop_requested: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        """Raise ValueError for parameters that do not train, or objects that step or accumulate on their own."""
        if not self.parameters or not all(parameter.requires_grad for parameter in self.parameters):
            raise ValueError("the parameters to train are empty, or some have requires_grad False")
        if self.accelerator.gradient_accumulation_steps != 1:
            raise ValueError("make the Accelerator without gradient_accumulation_steps: the loop itself accumulates")
        if type(self.lr_scheduler).__name__ == "AcceleratedScheduler":
            raise ValueError("give the plain scheduler: accelerate's would step once for every process")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be positive, not {self.max_steps}")


@dataclass(frozen=True)
class StepRecord:
    """One step: `loss` and `metrics` are means over the global batch; `updated` is False for a skipped step.

    `round`: inside a round, its data on this rank, which a checkpoint of this step must contain. `ends`: this is the
    last step of the run, although `max_steps` may not be reached.
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
