"""The online engine: draw a round with the current policy, learn from it in one or more steps, repeat.

It depends on no objective and no sampler. A round takes the next prompts of the addressed stream that offline training
uses too, and the ranks divide them in order. The drawn data are a list of chunks, each as large as memory allows. They
belong to the policy that drew them, so a checkpoint inside a round must contain them: each record there carries them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from diffusion_align.system.memory import OutOfMemory, free, logger, ran_out
from diffusion_align.train.batches import steps_of
from diffusion_align.train.collect import draw_round
from diffusion_align.train.method import Chunk, Columns, OnlineMethod, Round
from diffusion_align.train.processes.agree import on_any_rank, sum_over_ranks
from diffusion_align.train.processes.watch import record_activity
from diffusion_align.train.rechunk import rechunk
from diffusion_align.train.run import Progress, Run, StepRecord
from diffusion_align.train.steps import samples_at
from diffusion_align.train.update import Outcome, require_finite, update

if TYPE_CHECKING:
    from accelerate import Accelerator


class NothingToLearn(RuntimeError):
    """Too many steps in a row had no item to learn from."""


@dataclass(frozen=True)
class RoundSizes:
    """The sizes of rounds, steps and chunks.

    n: number of prompts. prompts_per_round: drawn with one policy, over all ranks. prompts_per_step: of one optimizer
    step. prompts_per_chunk: in the network at a time, on each rank. passes: how often a round is learned from.
    items_per_step: items (pairs) of a step, in place of prompts_per_step (see `batches`).
    max_rounds: the run also ends after this number of rounds; for runs whose number of steps depends on the items.
    """

    n: int
    prompts_per_round: int
    prompts_per_step: int
    prompts_per_chunk: int
    passes: int = 1
    items_per_step: int | None = None
    max_rounds: int | None = None

    @property
    def last_sample(self) -> float:
        """The most prompts that the run uses."""
        return math.inf if self.max_rounds is None else self.max_rounds * self.prompts_per_round


def run_rounds(method: OnlineMethod[Chunk], run: Run, sizes: RoundSizes) -> Iterator[StepRecord]:
    """Run complete rounds until `run.max_steps` optimizer steps are reached, yielding a record after each step.

    A round draws prompts with the current policy and makes `passes` passes over the drawn data. A step minimises the
    mean loss over all items of all ranks. A step without items, or with a value that is not finite, is skipped on all
    ranks and counted. If memory runs out on any rank, all ranks continue with chunks of half the size.

    With `items_per_step` the number of steps of a round depends on its items; a round without items is one skipped
    step. The run then ends exactly at `run.max_steps`, or after `max_rounds` rounds, whichever comes first. If
    `run.stop_requested` while a round is drawn, the loop ends without a record: no step is lost.

    Raises:
        ValueError: settings that do not fit together, or a start inside a round without its data.
        OutOfMemory: the pictures of one prompt do not fit.
        NothingToLearn, NonFiniteError: too many steps in a row were skipped; the last record has been yielded before.
    """
    accelerator, progress, round = run.accelerator, run.progress, run.round
    _check_settings(sizes, accelerator)
    fresh = progress.step == 0
    if (round is None) == (progress.in_round > 0):
        raise ValueError(f"to continue after step {progress.in_round} of a round, give the data of that round")
    while progress.step < run.max_steps and progress.samples < sizes.last_sample:
        samples = samples_at(progress.samples, sizes.prompts_per_round, sizes.n, run.seed)
        if round is None:
            starts = range(0, len(samples), sizes.prompts_per_step)
            steps = [samples[i : i + sizes.prompts_per_step] for i in starts]
            found = draw_round(method, run, steps, progress, sizes.prompts_per_chunk)
            if found is None:
                return
            round, progress = found
        drawn = _gather([method.round_columns(chunk) for chunks in round.chunks for chunk in chunks], accelerator)
        count, chunks_of = steps_of(method, round, sizes.items_per_step, (run.seed, progress.samples), accelerator)
        for number in range(progress.in_round, sizes.passes * count):
            record_activity("learning", progress.step + 1)
            exact = sizes.items_per_step is not None and progress.step + 1 >= run.max_steps
            last = number + 1 == sizes.passes * count or exact
            consumed = sizes.prompts_per_round if last else 0
            items = sum_over_ranks(accelerator, sum(method.items(chunk) for chunk in chunks_of(round, number)))
            # `update` averages gradients over the ranks; this factor makes that average the mean over all items.
            factor = accelerator.num_processes / max(items, 1) * (progress.loss_scale or 1.0)
            learned, progress, round = _learn(method, run, round, partial(chunks_of, number=number), factor, progress)
            columns = _gather(learned, accelerator)
            if fresh and items and method.check_start is not None:
                method.check_start(columns)
            fresh = fresh and not items
            if items:
                _fill_gradients(run)
                outcome = update(columns["loss"], run, progress, consumed)
            else:
                outcome = _skipped(run, progress, consumed)
            progress = replace(outcome.progress, in_round=0 if last else number + 1)
            metrics = method.summarise(columns, drawn) | {"items": float(items)} | outcome.metrics()
            ends = last and (progress.step >= run.max_steps or progress.samples >= sizes.last_sample)
            data = None if last else round
            yield StepRecord(
                progress.step, samples[-1][0], outcome.loss, metrics, progress, outcome.updated, data, ends
            )  # fmt: skip
            if not items and progress.skipped_in_row >= run.max_skipped_in_row:
                skipped = f"{progress.skipped_in_row} steps in a row had nothing to learn from"
                raise NothingToLearn(f"{skipped}: {method.empty_step_advice}")
            require_finite(outcome, run)
            if last:
                break
        round = None


def _learn(
    method: OnlineMethod[Chunk],
    run: Run,
    round: Round[Chunk],
    chunks_of: Callable[[Round[Chunk]], list[Chunk]],
    factor: float,
    progress: Progress,
) -> tuple[list[Columns], Progress, Round[Chunk]]:
    """Add the gradient of a step that learns from `chunks_of` its round, halving chunks when memory runs out.

    Returns the columns of its items, and progress and round with the halvings that were needed.
    """
    while True:
        run.optimizer.zero_grad(set_to_none=True)
        tried = _try_chunks(method, run, round, chunks_of, factor, progress)
        smaller = [chunk for chunk in _step_chunks(method, round, chunks_of, progress) if len(chunk.split(2)) > 1]
        failed, stuck = on_any_rank(run.accelerator, tried is None, tried is None and not smaller)
        if not failed:
            assert tried is not None  # no rank failed
            return tried[0], progress, tried[1]
        tried = None
        free()
        if stuck:
            raise OutOfMemory(f"step {progress.step + 1}: out of memory with the pictures of one prompt")
        logger.warning("step %d: out of memory; continuing with chunks of half the size", progress.step + 1)
        progress = replace(progress, halvings=progress.halvings + 1)


def _try_chunks(
    method: OnlineMethod[Chunk], run: Run, round: Round[Chunk], chunks_of: Callable[[Round[Chunk]], list[Chunk]],
    factor: float, progress: Progress,
) -> tuple[list[Columns], Round[Chunk]] | None:  # fmt: skip
    """The columns of each chunk, and the round in chunks of the current size; None if memory ran out, which leaves
    incomplete gradients."""
    device = run.accelerator.device
    try:
        round = rechunk(method, round, progress.halvings, progress.in_round == 0, device)
        chunks = _step_chunks(method, round, chunks_of, progress)
        return [method.learn(chunk.to(device), factor) for chunk in chunks], round
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return None


def _step_chunks(
    method: OnlineMethod[Chunk],
    round: Round[Chunk],
    chunks_of: Callable[[Round[Chunk]], list[Chunk]],
    progress: Progress,
) -> list[Chunk]:
    """The chunks of a step that have items, in the size that memory allows."""
    times = 2 ** (progress.halvings - round.halvings)  # above 1 only if `rechunk` left the round unchanged (SPO)
    return [smaller for chunk in chunks_of(round) for smaller in chunk.split(times) if method.items(smaller)]


def _fill_gradients(run: Run) -> None:
    """Zero gradients on a rank without items, because all ranks must reduce the same tensors."""
    if run.accelerator.num_processes > 1:
        for parameter in run.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _skipped(run: Run, progress: Progress, consumed: int) -> Outcome:
    """A step without items."""
    progress = replace(
        progress,
        step=progress.step + 1,
        samples=progress.samples + consumed,
        skipped=progress.skipped + 1,
        skipped_in_row=progress.skipped_in_row + 1,
    )
    return Outcome(progress, float("nan"), 0.0, float(run.optimizer.param_groups[0]["lr"]), False)


def _gather(learned: list[Columns], accelerator: Accelerator) -> Columns:
    """The rows of all chunks of all ranks, in order, float64 on the CPU; {} if no rank has any."""
    from accelerate.utils import gather_object

    mine: Columns = {
        name: torch.cat([one[name].detach().cpu().double().flatten() for one in learned])
        for name in (learned[0] if learned else {})
    }
    every: list[Any] = gather_object([mine]) if accelerator.num_processes > 1 else [mine]
    names = next((list(columns) for columns in every if columns), [])
    return {name: torch.cat([columns[name] for columns in every if columns]) for name in names}


def _check_settings(sizes: RoundSizes, accelerator: Accelerator) -> None:
    per_round, per_step = sizes.prompts_per_round, sizes.prompts_per_step
    if sizes.n < 1:
        raise ValueError("there are no prompts to train on")
    if min(per_round, per_step, sizes.passes) < 1:
        raise ValueError("prompts per round and per step, and passes, must be positive")
    if per_round % per_step or per_step % accelerator.num_processes:
        raise ValueError(
            f"prompts per round ({per_round}) must be a multiple of prompts per step ({per_step}), and those of the "
            f"number of processes ({accelerator.num_processes})"
        )
    if sizes.items_per_step is not None and (sizes.items_per_step < 1 or per_step != per_round):
        raise ValueError("items_per_step must be at least 1 and needs prompts_per_step equal to prompts_per_round")
