"""An open run, as both engines are handed it: what is trained, with what, from where and for how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter

if TYPE_CHECKING:
    from accelerate import Accelerator

FIRST_SCALE = 2.0**16  # of the loss in float16, as torch.amp.GradScaler has it: a power of two loses nothing


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with weights and optimizer, all that a loop needs to continue exactly.

    `loss_scale` is 0 where the loss is not scaled (float32, bfloat16); `scale_age` counts good steps since it changed.
    `halvings`: how often memory ran out, so that micro-batches or chunks were halved. `in_round`: steps taken of a
    round whose data an earlier policy drew; 0 between rounds, and always 0 offline. `norms`: gradient norms of the last
    good steps, kept where spikes are skipped.
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

    optimizer, lr_scheduler: plain torch objects; accelerate's would step once for every process.
    accelerator: made without gradient_accumulation_steps. Its processes average gradients in the engine, so the model
        must not be wrapped for distribution.
    seed: every draw is keyed by it.
    max_steps: the optimizer step at which the run ends.
    progress: where to continue; the default starts a fresh run.
    max_grad_norm: clip the total gradient norm to this; None: no clipping.
    spike: skip steps whose gradient norm is so many standard deviations above that of the last good steps.
    max_skipped_in_row: end the run after so many skipped steps in a row.
    round: where `progress` stands inside a round, this rank's data of it (from the checkpoint).
    asked: whether this process was told to stop; an online loop then ends while it draws.
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
    asked: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        """Raise ValueError for parameters that do not train, and for tools that step or accumulate by themselves."""
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

    `round`: inside a round, this rank's data of it; a run cannot continue from here without. `ends`: the run is
    finished with this step, where only the loop can know.
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
