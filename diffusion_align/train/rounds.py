"""Rounds of online training: collect with the present policy, learn from it in one or more steps, and again.

Knows no objective and no sampler. A round takes the next prompts of the same addressed stream that offline training
uses, and the processes share them out in order. What is collected is a list of chunks, each as large as memory allows
and learnt from in one piece. A round's data belong to the policy that drew them, so in the middle of a round a
checkpoint needs them too: each record there carries them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from diffusion_align.system.memory import OutOfMemory, free, logger, ran_out
from diffusion_align.train.batches import steps_of
from diffusion_align.train.collect import draw_round
from diffusion_align.train.method import Chunk, Columns, Method, Round
from diffusion_align.train.processes.agree import anywhere
from diffusion_align.train.processes.watch import doing
from diffusion_align.train.recut import recut
from diffusion_align.train.steps import samples_at
from diffusion_align.train.update import Outcome, Progress, StepRecord, require_finite, require_plain_tools, update

if TYPE_CHECKING:
    from accelerate import Accelerator


class NothingToLearn(RuntimeError):
    """Too many steps in a row had no item to learn from."""


def run_rounds(
    method: Method[Chunk],
    *,
    n: int,
    prompts_per_round: int,
    prompts_per_step: int,
    prompts_per_chunk: int,
    passes: int,
    parameters: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    accelerator: "Accelerator",
    seed: int,
    max_steps: int,
    max_grad_norm: float | None,
    progress: Progress,
    max_skipped_in_row: int = 5,
    spike: float | None = None,
    items_per_step: int | None = None,
    max_rounds: int | None = None,
    round: Round[Chunk] | None = None,
    asked: Callable[[], bool] = lambda: False,
) -> Iterator[StepRecord]:
    """Whole rounds until `max_steps` optimizer steps are reached, yielding a record after each step.

    A round draws `prompts_per_round` of n prompts (over all processes) and then goes over what it drew `passes` times,
    a step for each `prompts_per_step`. A step is the mean loss over all items of all processes. One without items, or
    with a number that is not finite, is skipped everywhere and counted. Where memory runs out on any process, all go
    on with chunks cut in two.

    With `items_per_step` a step takes so many of the items of the whole round instead (`batches`), so a round has as
    many steps as its items fill; one without any is one skipped step. The run then ends at `max_steps` exactly, or
    after `max_rounds` rounds, whichever comes first.

    Args:
        spike: skip steps with a gradient norm so many standard deviations above that of the steps before (`update`).
        round: the data of the round that `progress` stands in, from the checkpoint.
        asked: whether to stop; the loop then ends without a record if it is drawing, where nothing is lost.

    Raises:
        ValueError: settings that do not fit together, or the middle of a round without its data.
        OutOfMemory: the pictures of one prompt do not fit.
        NothingToLearn, NonFiniteError: so many steps in a row were skipped; the last record has been yielded before.
    """
    _check_settings(n, prompts_per_round, prompts_per_step, passes, max_steps, accelerator)
    if items_per_step is not None and (items_per_step < 1 or prompts_per_step != prompts_per_round):
        raise ValueError("items_per_step is at least 1 and replaces prompts_per_step: leave that at prompts_per_round")
    require_plain_tools(parameters, lr_scheduler, accelerator)
    tools = {"parameters": parameters, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
    fresh = progress.step == 0
    if (round is None) == (progress.in_round > 0):
        raise ValueError(f"a run that stands after step {progress.in_round} of a round needs that round's data")
    end = math.inf if max_rounds is None else max_rounds * prompts_per_round
    while progress.step < max_steps and progress.samples < end:
        samples = samples_at(progress.samples, prompts_per_round, n, seed)
        steps = [samples[i : i + prompts_per_step] for i in range(0, len(samples), prompts_per_step)]
        if round is None:
            found = draw_round(method, steps, progress, prompts_per_chunk, accelerator, asked)
            if found is None:
                return
            round, progress = found
        facts = _gather([method.facts(chunk) for chunks in round.chunks for chunk in chunks], accelerator)
        count, chunks_of = steps_of(method, round, items_per_step, (seed, progress.samples), accelerator)
        for number in range(progress.in_round, passes * count):
            doing("learning", progress.step + 1)
            last = number + 1 == passes * count or (items_per_step is not None and progress.step + 1 >= max_steps)
            consumed = prompts_per_round if last else 0
            total = _sum(sum(method.items(chunk) for chunk in chunks_of(round, number)), accelerator)
            # Gradients are averaged over the processes, so each must count its items as their number's share.
            factor = accelerator.num_processes / max(total, 1) * (progress.loss_scale or 1.0)
            parts, progress, round = _learn(
                method, round, partial(chunks_of, number=number), factor, progress, optimizer, accelerator
            )
            columns = _gather(parts, accelerator)
            if fresh and total and method.check_start is not None:
                method.check_start(columns)
            fresh = fresh and not total
            if total:
                _fill_gradients(parameters, accelerator)
                outcome = update(
                    columns["loss"], progress, consumed,
                    accelerator=accelerator, max_grad_norm=max_grad_norm, spike=spike, **tools,
                )  # fmt: skip
            else:
                outcome = _skipped(progress, consumed, optimizer)
            progress = replace(outcome.progress, in_round=0 if last else number + 1)
            metrics = method.summarise(columns, facts) | {"items": float(total)} | outcome.metrics()
            ends = last and (progress.step >= max_steps or progress.samples >= end)
            yield StepRecord(
                progress.step, samples[-1][0], outcome.loss, metrics, progress, outcome.updated,
                None if last else round, ends,
            )  # fmt: skip
            if not total and progress.skipped_in_row >= max_skipped_in_row:
                raise NothingToLearn(
                    f"{progress.skipped_in_row} steps in a row had nothing to learn from: {method.nothing}"
                )
            require_finite(outcome, max_skipped_in_row)
            if last:
                break
        round = None


def _learn(
    method: Method[Chunk],
    round: Round[Chunk],
    chunks_of: Callable[[Round[Chunk]], list[Chunk]],
    factor: float,
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    accelerator: "Accelerator",
) -> tuple[list[Columns], Progress, Round[Chunk]]:
    """The gradient of a step that takes `chunks_of` its round, the columns of its items, and the round as it now is:
    chunks are cut in two wherever memory runs out."""
    while True:
        optimizer.zero_grad(set_to_none=True)
        times = 2 ** (progress.halvings - round.halvings)
        pieces = [piece for chunk in chunks_of(round) for piece in chunk.cut(times) if method.items(piece)]
        tried = _try_pieces(method, round, chunks_of, factor, progress, accelerator)
        can_halve = any(len(piece.cut(2)) > 1 for piece in pieces)
        failed, stuck = anywhere(accelerator, tried is None, tried is None and not can_halve)
        if not failed:
            assert tried is not None  # here, as it is nowhere
            return tried[0], progress, tried[1]
        tried = None
        free()
        if stuck:
            raise OutOfMemory(f"step {progress.step + 1}: out of memory with the pictures of one prompt")
        logger.warning("step %d: out of memory; going on with chunks of half the size", progress.step + 1)
        progress = replace(progress, halvings=progress.halvings + 1)


def _try_pieces(
    method: Method[Chunk], round: Round[Chunk], chunks_of: Callable[[Round[Chunk]], list[Chunk]], factor: float,
    progress: Progress, accelerator: "Accelerator",
) -> tuple[list[Columns], Round[Chunk]] | None:  # fmt: skip
    """Columns of the pieces, and the round cut to the present size; None if memory ran out, and then the gradients are
    those of a part."""
    try:
        round = recut(method, round, progress.halvings, progress.in_round == 0, accelerator.device)
        times = 2 ** (progress.halvings - round.halvings)  # more than 1 where nothing depends on the batch
        pieces = [piece for chunk in chunks_of(round) for piece in chunk.cut(times) if method.items(piece)]
        return [method.learn(piece.to(accelerator.device), factor) for piece in pieces], round
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return None


def _fill_gradients(parameters: Sequence[Parameter], accelerator: "Accelerator") -> None:
    """Zeros where a process had no item, for all must average the same gradients."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _skipped(progress: Progress, consumed: int, optimizer: torch.optim.Optimizer) -> Outcome:
    """A step that nothing asks for."""
    progress = replace(
        progress,
        step=progress.step + 1,
        samples=progress.samples + consumed,
        skipped=progress.skipped + 1,
        skipped_in_row=progress.skipped_in_row + 1,
    )
    return Outcome(progress, float("nan"), 0.0, float(optimizer.param_groups[0]["lr"]), False)


def _sum(value: int, accelerator: "Accelerator") -> int:
    if accelerator.num_processes == 1:
        return value
    total = accelerator.reduce(torch.tensor(value, dtype=torch.int64, device=accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return int(total)


def _gather(parts: list[Columns], accelerator: "Accelerator") -> Columns:
    """The rows of all chunks of all processes, in order, float64 on the CPU; {} when nobody has any."""
    from accelerate.utils import gather_object

    mine: Columns = {
        name: torch.cat([part[name].detach().cpu().double().flatten() for part in parts]) for name in (parts or [{}])[0]
    }
    every: list[Any] = gather_object([mine]) if accelerator.num_processes > 1 else [mine]
    names = next((list(columns) for columns in every if columns), [])
    return {name: torch.cat([columns[name] for columns in every if columns]) for name in names}


def _check_settings(
    n: int, per_round: int, per_step: int, passes: int, max_steps: int, accelerator: "Accelerator"
) -> None:
    if n < 1:
        raise ValueError("there is nothing to train on: no prompts")
    if min(per_round, per_step, passes, max_steps) < 1:
        raise ValueError("prompts per round and per step, passes and steps must be positive")
    if per_round % per_step or per_step % accelerator.num_processes:
        raise ValueError(
            f"{per_round} prompts a round must be a multiple of {per_step} a step, and those of "
            f"{accelerator.num_processes} processes"
        )
