"""Optimizer steps over an addressed stream of samples: order, accumulation, processes. Knows no objective.

The stream is one long line of samples, epoch after epoch, each epoch in its own addressed order. A position in it is a
number, so a run goes on exactly where it was, in the middle of an epoch or on its edge. One step takes the next
`batch_size` samples; they are cut into accumulation x processes equal pieces, in that order, so two processes do what
accumulation 2 does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from diffusion_align import rng
from diffusion_align.system.memory import free, halved, ran_out
from diffusion_align.train.processes.agree import anywhere
from diffusion_align.train.processes.watch import doing
from diffusion_align.train.update import (
    NonFiniteError,
    Progress,
    StepRecord,
    require_finite,
    require_plain_tools,
    scaled_backward,
    update,
)

__all__ = ["NonFiniteError", "Progress", "Sample", "StepRecord", "Survey", "run_steps", "samples_at"]

if TYPE_CHECKING:
    from accelerate import Accelerator

Sample = tuple[int, int]
"""(epoch, index in the data): the address of everything drawn for it."""

MicroBatch = Callable[[list[Sample], list[Sample]], dict[str, Tensor]]
"""(samples [b], all samples of the step) -> {"loss": [b] with its graph, further columns [b] to report}."""


@dataclass(frozen=True)
class Survey:
    """A look at all samples of a step before any of its gradients, for a loss whose terms depend on the whole batch.

    look: samples [b] -> columns [b], called without gradients on each micro-batch.
    hear: is told those columns of the whole batch [batch_size], in stream order, float64 on the CPU.
    """

    look: Callable[[list[Sample]], dict[str, Tensor]]
    hear: Callable[[dict[str, Tensor]], None]


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
    spike: float | None = None,
    check_first: Callable[[dict[str, Tensor]], None] | None = None,
    survey: Survey | None = None,
) -> Iterator[StepRecord]:
    """Step until `max_steps`, yielding a record after each step.

    Gradients are averaged here, once a step, so the model must not be wrapped for distribution, and optimizer and
    scheduler must be plain. A step whose loss or gradient is not finite anywhere is skipped on every process: weights,
    optimizer and learning-rate schedule stay as they are, and its samples are passed over. Where memory runs out on
    any process, all begin the step again with pieces cut in two; samples and gradient stay what they were.

    Args:
        spike: skip steps with a gradient norm so many standard deviations above that of the steps before (`update`).
        summarise: the columns of the whole global batch [batch_size], in stream order, -> metrics.
        check_first: called with those columns in the first step of a fresh run, before the update; raises to stop.
        survey: made before the gradients of each step, unless one micro-batch holds the whole step.

    Raises:
        ValueError: settings that do not fit together.
        NonFiniteError: `max_skipped_in_row` steps in a row were skipped; the last record has been yielded before.
        OutOfMemory: one sample at a time does not fit.
    """
    _check_settings(n, batch_size, accumulation, max_steps, accelerator, parameters, lr_scheduler)
    piece = batch_size // (accumulation * accelerator.num_processes)
    while progress.step < max_steps:
        doing("learning", progress.step + 1)
        samples = samples_at(progress.samples, batch_size, n, seed)
        starts = range(accelerator.process_index * piece, batch_size, accelerator.num_processes * piece)
        mine = [samples[first : first + piece] for first in starts]
        while True:
            optimizer.zero_grad(set_to_none=True)
            size = _piece_size(piece, progress.halvings)
            ready = survey is None or size >= batch_size or _surveyed(survey, mine, progress, accelerator)
            parts = _try_pieces(micro_batch, samples, mine, progress) if ready else None
            (failed,) = anywhere(accelerator, parts is None)
            if not failed:
                break
            parts = None
            free()
            halved(_piece_size(piece, progress.halvings), f"step {progress.step + 1}")
            progress = replace(progress, halvings=progress.halvings + 1)
        assert parts is not None  # here, as it is nowhere
        columns = _gather(parts, accelerator)
        if progress.step == 0 and check_first is not None:
            check_first(columns)
        outcome = update(
            columns["loss"],
            progress,
            batch_size,
            parameters=parameters,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            accelerator=accelerator,
            max_grad_norm=max_grad_norm,
            spike=spike,
        )
        progress = outcome.progress
        metrics = summarise(columns) | outcome.metrics()
        yield StepRecord(progress.step, samples[-1][0], outcome.loss, metrics, progress, outcome.updated)
        require_finite(outcome, max_skipped_in_row)


def _piece_size(piece: int, halvings: int) -> int:
    """The most samples that go through the networks at a time."""
    return -(-piece // 2**halvings)


def _try_pieces(
    micro_batch: MicroBatch, samples: list[Sample], mine: list[list[Sample]], progress: Progress
) -> list[dict[str, Tensor]] | None:
    """The columns of this process's pieces of a step, whose gradients are then there; None if memory ran out."""

    def learn(part: list[Sample], piece: list[Sample]) -> dict[str, Tensor]:
        columns = micro_batch(part, samples)
        # The mean over the step; 1 x, and so no other rounding, where a piece is whole.
        share = len(columns["loss"]) / len(piece)
        scaled_backward(columns["loss"].mean() / len(mine) * share, progress)
        return columns

    return _in_parts(learn, mine, progress)


@torch.no_grad()
def _surveyed(survey: Survey, mine: list[list[Sample]], progress: Progress, accelerator: "Accelerator") -> bool:
    """Make the survey of a step; False, on every process, if memory ran out on any."""
    seen = _try_survey(survey.look, mine, progress)
    (failed,) = anywhere(accelerator, seen is None)
    if seen is not None and not failed:
        survey.hear(_gather(seen, accelerator))
    return not failed


def _try_survey(
    look: Callable[[list[Sample]], dict[str, Tensor]], mine: list[list[Sample]], progress: Progress
) -> list[dict[str, Tensor]] | None:
    """What `look` finds on this process's pieces of a step; None if memory ran out."""
    return _in_parts(lambda part, _: look(part), mine, progress)


def _in_parts(
    work: Callable[[list[Sample], list[Sample]], dict[str, Tensor]], mine: list[list[Sample]], progress: Progress
) -> list[dict[str, Tensor]] | None:
    """The columns of `work(part, piece)` on each piece, in parts that memory allows; None if it ran out."""
    parts = []
    try:
        for piece in mine:
            size = _piece_size(len(piece), progress.halvings)
            cut = []
            for first in range(0, len(piece), size):
                columns = work(piece[first : first + size], piece)
                cut.append({name: column.detach() for name, column in columns.items()})
            parts.append({name: torch.cat([columns[name] for columns in cut]) for name in cut[0]})
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return None
    return parts


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
    require_plain_tools(parameters, lr_scheduler, accelerator)


def _gather(parts: list[dict[str, Tensor]], accelerator: "Accelerator") -> dict[str, Tensor]:
    """The columns of all pieces [b] of all processes, in stream order [batch_size], float64 on the CPU."""
    names = list(parts[0])
    mine = torch.stack([torch.stack([part[name] for name in names]) for part in parts])  # [A, columns, b]
    every = accelerator.gather(mine[None])
    assert isinstance(every, Tensor)  # [P, A, columns, b]
    rows = every.cpu().to(torch.float64).permute(2, 1, 0, 3).flatten(1)
    return dict(zip(names, rows, strict=True))
