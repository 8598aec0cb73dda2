"""Optimizer steps over an addressed stream of samples: order, accumulation, processes, bad numbers. Knows no objective.

The stream is one long line of samples, epoch after epoch, each epoch in its own addressed order. A position in it is a
number, so a run goes on exactly where it was, in the middle of an epoch or on its edge. One step takes the next
`batch_size` samples; they are cut into accumulation x processes equal pieces, in that order, so two processes do what
accumulation 2 does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from diffusion_align import rng

if TYPE_CHECKING:
    from accelerate import Accelerator

Sample = tuple[int, int]
"""(epoch, index in the data): the address of everything drawn for it."""

MicroBatch = Callable[[list[Sample]], dict[str, Tensor]]
"""samples [b] -> {"loss": [b] with its graph, further columns [b] to report}. Called once per piece of a step."""

_BUCKET = 2**25  # elements per all-reduce: 128 MiB of float32


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands; all a loop needs, besides weights and optimizer, to go on exactly."""

    step: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_row: int = 0


@dataclass(frozen=True)
class StepRecord:
    """One step: `loss` and `metrics` are means over the global batch; `updated` is False for a skipped step."""

    step: int
    epoch: int
    loss: float
    metrics: dict[str, float] = field(repr=False)
    progress: Progress = field(repr=False)
    updated: bool = True

    def row(self) -> dict[str, Any]:
        """The record as one flat row of metrics.jsonl."""
        return {"step": self.step, "epoch": self.epoch, "loss": self.loss, **self.metrics}


def samples_at(position: int, count: int, n: int, seed: int) -> list[Sample]:
    """The `count` samples that follow the first `position` ones of the stream over n data."""
    places = (divmod(place, n) for place in range(position, position + count))
    return [(epoch, _order(n, seed, epoch)[offset]) for epoch, offset in places]


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    return rng.permutation(n, seed, "shuffle", epoch).tolist()


def run_steps(
    micro_batch: MicroBatch,
    summarise: Callable[[dict[str, Tensor]], dict[str, float]],
    *,
    n: int,
    parameters: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    accelerator: "Accelerator",
    batch_size: int,
    accumulation: int,
    seed: int,
    max_steps: int,
    max_grad_norm: float | None,
    progress: Progress,
    max_skipped_in_row: int = 5,
    check_first: Callable[[dict[str, Tensor]], None] | None = None,
) -> Iterator[StepRecord]:
    """Step until `max_steps`, yielding a record after each step.

    Gradients are averaged here, once a step, so the model must not be wrapped for distribution, and optimizer and
    scheduler must be plain. A step whose loss or gradient is not finite anywhere is skipped on every process: weights,
    optimizer and learning-rate schedule stay as they are, and its samples are passed over.

    Args:
        summarise: the columns of the whole global batch [batch_size], in stream order, -> metrics.
        check_first: called with those columns in the first step of a fresh run, before the update; raises to stop.

    Raises:
        ValueError: settings that do not fit together.
        NonFiniteError: `max_skipped_in_row` steps in a row were skipped; the last record has been yielded before.
    """
    _check_settings(n, batch_size, accumulation, max_steps, accelerator, parameters, lr_scheduler)
    piece = batch_size // (accumulation * accelerator.num_processes)
    while progress.step < max_steps:
        samples = samples_at(progress.samples, batch_size, n, seed)
        optimizer.zero_grad(set_to_none=True)
        parts = []
        for micro in range(accumulation):
            first = (micro * accelerator.num_processes + accelerator.process_index) * piece
            columns = micro_batch(samples[first : first + piece])
            accelerator.backward(columns["loss"].mean() / accumulation)
            parts.append({name: column.detach() for name, column in columns.items()})
        columns = _gather(parts, accelerator)
        if progress.step == 0 and check_first is not None:
            check_first(columns)
        norm = _mean_gradients(parameters, accelerator)
        # Losses are gathered and gradients averaged, so every process decides the same.
        finite = bool(torch.isfinite(columns["loss"]).all()) and bool(torch.isfinite(norm))
        rate = float(optimizer.param_groups[0]["lr"])
        if finite:
            if max_grad_norm is not None:
                clip_grads_with_norm_(parameters, max_grad_norm, norm)
            optimizer.step()
            if lr_scheduler is not None:
                lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        progress = Progress(
            progress.step + 1,
            progress.samples + batch_size,
            progress.skipped + (not finite),
            0 if finite else progress.skipped_in_row + 1,
        )
        metrics = summarise(columns) | {
            "grad_norm": float(norm),
            "lr": rate,
            "samples": progress.samples,
            "skipped": progress.skipped,
        }
        loss = float(columns["loss"].mean())
        yield StepRecord(progress.step, samples[-1][0], loss, metrics, progress, finite)
        if not finite and progress.skipped_in_row >= max_skipped_in_row:
            raise NonFiniteError(
                f"steps {progress.step - progress.skipped_in_row + 1} to {progress.step} each had a loss or gradient "
                f"that is not finite (loss {loss}, gradient norm {float(norm)}); the weights are still those before "
                "them. Lower the learning rate or beta, or train in float32 or bfloat16"
            )


def _check_settings(
    n: int,
    batch_size: int,
    accumulation: int,
    max_steps: int,
    accelerator: "Accelerator",
    parameters: Sequence[Parameter],
    lr_scheduler: object,
) -> None:
    if n < 1:
        raise ValueError("there is nothing to train on: the data are empty")
    if min(batch_size, accumulation, max_steps) < 1:
        raise ValueError(
            f"batch_size {batch_size}, accumulation {accumulation} and max_steps {max_steps} must be positive"
        )
    pieces = accumulation * accelerator.num_processes
    if batch_size % pieces:
        raise ValueError(
            f"batch_size {batch_size} (of a whole step, over all processes) cannot be cut into accumulation "
            f"{accumulation} x processes {accelerator.num_processes} = {pieces} equal pieces"
        )
    if not parameters or not all(parameter.requires_grad for parameter in parameters):
        raise ValueError("the parameters to train are empty, or some have requires_grad False")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("make the Accelerator without gradient_accumulation_steps: the loop itself accumulates")
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "float16 needs loss scaling, which would hide bad gradients here: take mixed_precision bf16 or no"
        )
    if type(lr_scheduler).__name__ == "AcceleratedScheduler":
        raise ValueError("give the plain scheduler: accelerate's would step once for every process")


def _gather(parts: list[dict[str, Tensor]], accelerator: "Accelerator") -> dict[str, Tensor]:
    """The columns of all pieces [b] of all processes, in stream order [batch_size], float64 on the CPU."""
    names = list(parts[0])
    mine = torch.stack([torch.stack([part[name] for name in names]) for part in parts])  # [A, columns, b]
    every = accelerator.gather(mine[None])
    assert isinstance(every, Tensor)  # [P, A, columns, b]
    rows = every.cpu().to(torch.float64).permute(2, 1, 0, 3).flatten(1)
    return dict(zip(names, rows, strict=True))


def _mean_gradients(parameters: Sequence[Parameter], accelerator: "Accelerator") -> Tensor:
    """Average gradients over the processes, in place, a bucket at a time; returns their total norm."""
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
    return get_total_norm(gradients)
