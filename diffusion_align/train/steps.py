"""The offline engine: optimizer steps over an addressed stream of samples. It depends on no objective.

The stream is the concatenation of all epochs, each in its own addressed order. A position in it is one number, so a run
continues exactly where it was, also inside an epoch. One step takes the next `batch_size` samples and splits them, in
that order, into accumulation x processes equal micro-batches. So two processes do what accumulation 2 does. Where the
method's items have groups, the stream is that of `groups`, whose micro-batches hold one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.system.memory import free, halved, ran_out
from diffusion_align.train.groups import grouped_samples_at, members_of
from diffusion_align.train.method import Columns, OfflineMethod, Sample, Survey
from diffusion_align.train.processes.agree import on_any_rank
from diffusion_align.train.processes.watch import record_activity
from diffusion_align.train.run import Progress, Run, StepRecord
from diffusion_align.train.update import require_finite, scaled_backward, update

if TYPE_CHECKING:
    from accelerate import Accelerator


def samples_at(position: int, count: int, n: int, seed: int) -> list[Sample]:
    """The `count` samples after the first `position` samples of the stream over n items."""
    places = (divmod(place, n) for place in range(position, position + count))
    return [(epoch, _order(n, seed, epoch)[offset]) for epoch, offset in places]


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    return rng.permutation(n, seed, "shuffle", epoch).tolist()


def run_steps(method: OfflineMethod, run: Run, *, batch_size: int, accumulation: int = 1) -> Iterator[StepRecord]:
    """Step until `run.max_steps`, yielding a record after each step.

    A step whose loss or gradient is not finite on any rank is skipped on all: weights, optimizer and learning-rate
    schedule stay the same, and its samples count as used. If memory runs out on any rank, all ranks repeat the step
    with micro-batches of half the size; samples and gradient stay the same.

    Args:
        batch_size: samples of an optimizer step, over all ranks and micro-batches.
        accumulation: micro-batches of a step on each rank.

    Raises:
        ValueError: settings that do not fit together.
        NonFiniteError: too many steps in a row were skipped; raised after the last record.
        OutOfMemory: one sample at a time does not fit.
    """
    accelerator, progress = run.accelerator, run.progress
    _check_settings(method.n, batch_size, accumulation, accelerator)
    rows = batch_size // (accumulation * accelerator.num_processes)
    members = members_of(method.groups) if method.groups is not None else ()
    while progress.step < run.max_steps:
        record_activity("learning", progress.step + 1)
        if len(members) > 1:
            samples = grouped_samples_at(progress.samples, batch_size, members, rows, run.seed)
        else:
            samples = samples_at(progress.samples, batch_size, method.n, run.seed)
        starts = range(accelerator.process_index * rows, batch_size, accelerator.num_processes * rows)
        mine = [samples[first : first + rows] for first in starts]
        while True:
            run.optimizer.zero_grad(set_to_none=True)
            size = _size(rows, progress.halvings)
            ready = method.survey is None or size >= batch_size or _surveyed(method.survey, mine, progress, accelerator)
            by_micro_batch = _try_step(method, samples, mine, progress) if ready else None
            (failed,) = on_any_rank(accelerator, by_micro_batch is None)
            if not failed:
                break
            by_micro_batch = None
            free()
            halved(size, f"step {progress.step + 1}")
            progress = replace(progress, halvings=progress.halvings + 1)
        assert by_micro_batch is not None  # no rank failed
        columns = _gather(by_micro_batch, accelerator)
        if progress.step == 0 and method.check_start is not None:
            method.check_start(columns)
        outcome = update(columns["loss"], run, progress, batch_size)
        progress = outcome.progress
        metrics = method.summarise(columns) | outcome.metrics()
        yield StepRecord(progress.step, samples[-1][0], outcome.loss, metrics, progress, outcome.updated)
        require_finite(outcome, run)


def _size(micro_batch: int, halvings: int) -> int:
    """The most samples that the networks process at a time."""
    return -(-micro_batch // 2**halvings)


def _try_step(
    method: OfflineMethod, samples: list[Sample], mine: list[list[Sample]], progress: Progress
) -> list[Columns] | None:
    """Add the gradients of this rank's micro-batches and return their columns; None if memory ran out."""

    def learn(some: list[Sample], micro_batch: list[Sample]) -> Columns:
        columns = method.micro_batch(some, samples)
        # The mean over the step. If no micro-batch was halved, the factor is 1 and the product exact.
        factor = len(columns["loss"]) / len(micro_batch)
        scaled_backward(columns["loss"].mean() / len(mine) * factor, progress)
        return columns

    return _columns_of(learn, mine, progress)


@torch.no_grad()
def _surveyed(survey: Survey, mine: list[list[Sample]], progress: Progress, accelerator: Accelerator) -> bool:
    """Run the survey of a step; False, on all ranks, if memory ran out on any."""
    measured = _columns_of(lambda some, _: survey.measure(some), mine, progress)
    (failed,) = on_any_rank(accelerator, measured is None)
    if measured is not None and not failed:
        survey.receive(_gather(measured, accelerator))
    return not failed


def _columns_of(
    work: Callable[[list[Sample], list[Sample]], Columns], mine: list[list[Sample]], progress: Progress
) -> list[Columns] | None:
    """The columns of `work(some samples, their micro-batch)` for each micro-batch; None if memory ran out."""
    found = []
    try:
        for micro_batch in mine:
            size, halves = _size(len(micro_batch), progress.halvings), []
            for first in range(0, len(micro_batch), size):
                columns = work(micro_batch[first : first + size], micro_batch)
                halves.append({name: column.detach() for name, column in columns.items()})
            found.append({name: torch.cat([half[name] for half in halves]) for name in halves[0]})
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return None
    return found


def _check_settings(n: int, batch_size: int, accumulation: int, accelerator: Accelerator) -> None:
    if n < 1:
        raise ValueError("there is nothing to train on: the data set is empty")
    if min(batch_size, accumulation) < 1:
        raise ValueError(f"batch_size {batch_size} and accumulation {accumulation} must be positive")
    micro_batches = accumulation * accelerator.num_processes
    if batch_size % micro_batches:
        raise ValueError(
            f"batch_size {batch_size} (of one step, over all processes) cannot be split into accumulation "
            f"{accumulation} x processes {accelerator.num_processes} = {micro_batches} equal micro-batches"
        )


def _gather(by_micro_batch: list[Columns], accelerator: Accelerator) -> Columns:
    """The columns of all micro-batches [b] of all ranks, in stream order [batch_size], float64 on the CPU."""
    names = list(by_micro_batch[0])
    mine = torch.stack([torch.stack([one[name] for name in names]) for one in by_micro_batch])  # [A, columns, b]
    every = accelerator.gather(mine[None])
    assert isinstance(every, Tensor)  # [P, A, columns, b]
    rows = every.cpu().to(torch.float64).permute(2, 1, 0, 3).flatten(1)
    return dict(zip(names, rows, strict=True))
