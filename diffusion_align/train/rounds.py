"""The online engine: draw a round with the present policy, learn from it in one or more steps, and again.

Knows no objective and no sampler. A round takes the next prompts of the same addressed stream that offline training
uses, and the ranks share them out in order. What is collected is a list of chunks, each as large as memory allows. A
round's data belong to the policy that drew them, so a checkpoint inside a round needs them too: each record there
carries them.
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
from diffusion_align.train.processes.watch import doing
from diffusion_align.train.recut import recut
from diffusion_align.train.run import Progress, Run, StepRecord
from diffusion_align.train.steps import samples_at
from diffusion_align.train.update import Outcome, require_finite, update

if TYPE_CHECKING:
    from accelerate import Accelerator


class NothingToLearn(RuntimeError):
    """Too many steps in a row had no item to learn from."""


@dataclass(frozen=True)
class RoundSizes:
    """How much a round draws and a step takes of it.

    n: prompts there are. prompts_per_round: drawn with one policy, over all ranks. prompts_per_step: of one optimizer
    step. prompts_per_chunk: in the network at a time, on each rank. passes: times that a round is learnt from.
    items_per_step: instead of prompts_per_step, so many items (pairs) of the whole round a step (`batches`).
    max_rounds: where the number of steps depends on the items, the run also ends after so many rounds.
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
        """How many prompts the run uses at most."""
        return math.inf if self.max_rounds is None else self.max_rounds * self.prompts_per_round


def run_rounds(method: OnlineMethod[Chunk], run: Run, sizes: RoundSizes) -> Iterator[StepRecord]:
    """Whole rounds until `run.max_steps` optimizer steps are reached, yielding a record after each step.

    A round draws prompts with the present policy and goes over what it drew `passes` times. A step is the mean loss
    over all items of all ranks. One without items, or with a number that is not finite, is skipped everywhere and
    counted. Where memory runs out on any rank, all continue with chunks of half the size.

    With `items_per_step` a round has as many steps as its items fill; one without any is one skipped step. The run then
    ends at `run.max_steps` exactly, or after `max_rounds` rounds, whichever comes first. If `run.asked` while a round
    is drawn, the loop ends without a record: nothing is lost there.

    Raises:
        ValueError: settings that do not fit together, or the middle of a round without its data.
        OutOfMemory: the pictures of one prompt do not fit.
        NothingToLearn, NonFiniteError: too many steps in a row were skipped; the last record has been yielded before.
    """
    accelerator, progress, round = run.accelerator, run.progress, run.round
    _check_settings(sizes, accelerator)
    fresh = progress.step == 0
    if (round is None) == (progress.in_round > 0):
        raise ValueError(f"a run that stands after step {progress.in_round} of a round needs that round's data")
    while progress.step < run.max_steps and progress.samples < sizes.last_sample:
        samples = samples_at(progress.samples, sizes.prompts_per_round, sizes.n, run.seed)
        if round is None:
            starts = range(0, len(samples), sizes.prompts_per_step)
            steps = [samples[i : i + sizes.prompts_per_step] for i in starts]
            found = draw_round(method, run, steps, progress, sizes.prompts_per_chunk)
            if found is None:
                return
            round, progress = found
        facts = _gather([method.facts(chunk) for chunks in round.chunks for chunk in chunks], accelerator)
        count, chunks_of = steps_of(method, round, sizes.items_per_step, (run.seed, progress.samples), accelerator)
        for number in range(progress.in_round, sizes.passes * count):
            doing("learning", progress.step + 1)
            exact = sizes.items_per_step is not None and progress.step + 1 >= run.max_steps
            last = number + 1 == sizes.passes * count or exact
            consumed = sizes.prompts_per_round if last else 0
            items = sum_over_ranks(accelerator, sum(method.items(chunk) for chunk in chunks_of(round, number)))
            # Gradients are averaged over the ranks, so each must count its items as their number's fraction.
            factor = accelerator.num_processes / max(items, 1) * (progress.loss_scale or 1.0)
            parts, progress, round = _learn(method, run, round, partial(chunks_of, number=number), factor, progress)
            columns = _gather(parts, accelerator)
            if fresh and items and method.check_start is not None:
                method.check_start(columns)
            fresh = fresh and not items
            if items:
                _fill_gradients(run)
                outcome = update(columns["loss"], run, progress, consumed)
            else:
                outcome = _skipped(run, progress, consumed)
            progress = replace(outcome.progress, in_round=0 if last else number + 1)
            metrics = method.summarise(columns, facts) | {"items": float(items)} | outcome.metrics()
            ends = last and (progress.step >= run.max_steps or progress.samples >= sizes.last_sample)
            data = None if last else round
            yield StepRecord(
                progress.step, samples[-1][0], outcome.loss, metrics, progress, outcome.updated, data, ends
            )  # fmt: skip
            if not items and progress.skipped_in_row >= run.max_skipped_in_row:
                raise NothingToLearn(
                    f"{progress.skipped_in_row} steps in a row had nothing to learn from: {method.nothing}"
                )
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
    """The gradient of a step that takes `chunks_of` its round, the columns of its items, and the round as it is then:
    chunks are halved wherever memory runs out."""
    while True:
        run.optimizer.zero_grad(set_to_none=True)
        tried = _try_chunks(method, run, round, chunks_of, factor, progress)
        smaller = [chunk for chunk in _step_chunks(method, round, chunks_of, progress) if len(chunk.cut(2)) > 1]
        failed, stuck = on_any_rank(run.accelerator, tried is None, tried is None and not smaller)
        if not failed:
            assert tried is not None  # no rank failed, so every part exists
            return tried[0], progress, tried[1]
        tried = None
        free()
        if stuck:
            raise OutOfMemory(f"step {progress.step + 1}: out of memory with the pictures of one prompt")
        logger.warning("step %d: out of memory; going on with chunks of half the size", progress.step + 1)
        progress = replace(progress, halvings=progress.halvings + 1)


def _try_chunks(
    method: OnlineMethod[Chunk], run: Run, round: Round[Chunk], chunks_of: Callable[[Round[Chunk]], list[Chunk]],
    factor: float, progress: Progress,
) -> tuple[list[Columns], Round[Chunk]] | None:  # fmt: skip
    """The columns of each chunk, and the round in chunks of the present size; None if memory ran out, and then the
    gradients are incomplete."""
    device = run.accelerator.device
    try:
        round = recut(method, round, progress.halvings, progress.in_round == 0, device)
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
    """The chunks of a step that have items, as small as memory was found to need."""
    times = 2 ** (progress.halvings - round.halvings)  # more than 1 where nothing depends on the batch
    return [part for chunk in chunks_of(round) for part in chunk.cut(times) if method.items(part)]


def _fill_gradients(run: Run) -> None:
    """Zeros where a rank had no item, for all must average the same gradients."""
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


def _gather(parts: list[Columns], accelerator: Accelerator) -> Columns:
    """The rows of all chunks of all processes, in order, float64 on the CPU; {} when nobody has any."""
    from accelerate.utils import gather_object

    mine: Columns = {
        name: torch.cat([part[name].detach().cpu().double().flatten() for part in parts]) for name in (parts or [{}])[0]
    }
    every: list[Any] = gather_object([mine]) if accelerator.num_processes > 1 else [mine]
    names = next((list(columns) for columns in every if columns), [])
    return {name: torch.cat([columns[name] for columns in every if columns]) for name in names}


def _check_settings(sizes: RoundSizes, accelerator: Accelerator) -> None:
    per_round, per_step = sizes.prompts_per_round, sizes.prompts_per_step
    if sizes.n < 1:
        raise ValueError("there is nothing to train on: no prompts")
    if min(per_round, per_step, sizes.passes) < 1:
        raise ValueError("prompts per round and per step, and passes, must be positive")
    if per_round % per_step or per_step % accelerator.num_processes:
        raise ValueError(
            f"{per_round} prompts a round must be a multiple of {per_step} a step, and those of "
            f"{accelerator.num_processes} processes"
        )
    if sizes.items_per_step is not None and (sizes.items_per_step < 1 or per_step != per_round):
        raise ValueError("items_per_step is at least 1 and replaces prompts_per_step: leave that at prompts_per_round")
