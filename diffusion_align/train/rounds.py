"""Rounds of online training: collect with the present policy, learn from it in one or more steps, and again.

Knows no objective and no sampler. A round takes the next prompts of the same addressed stream that offline training
uses, and the processes share them out in order. What is collected is a list of chunks, each as large as memory allows
and learnt from in one piece. A checkpoint is exact between rounds only: a round's data belong to the policy that drew
them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from diffusion_align.train.steps import Sample, samples_at
from diffusion_align.train.update import Outcome, Progress, StepRecord, require_finite, require_plain_tools, update

if TYPE_CHECKING:
    from accelerate import Accelerator


class Movable(Protocol):
    """What was drawn; it waits in main memory, so that the device holds one chunk however many pictures a round has."""

    def to(self, device: torch.device | str, /) -> Self: ...


Chunk = TypeVar("Chunk", bound=Movable)
Columns = dict[str, Tensor]
"""Numbers of what was collected or learnt from, [M] each: a row an item, a picture or a group."""


class NothingToLearn(RuntimeError):
    """Too many steps in a row had no item to learn from."""


@dataclass(frozen=True)
class Method(Generic[Chunk]):
    """What a round asks of a method.

    collect: (samples (epoch, prompt), round) -> a chunk of whole groups, drawn and scored without gradients. The round
        is named by the prompts used before it: an address for what all of it shares.
    items: how many pairs or groups of a chunk can be learnt from; 0 where all are tied or filtered out.
    learn: (chunk, factor) -> columns of its items, "loss" among them; adds the gradient of factor x the sum of losses.
    facts: chunk -> columns of its pictures, such as "reward".
    summarise: (columns of the items of a step, facts of its round) -> metrics. The items may be none.
    check_start: called with the columns of the first step of a fresh run, before the update; raises to stop.
    nothing: what to do about a step without items, for the message that ends a run of such steps.
    """

    collect: Callable[[list[Sample], int], Chunk]
    items: Callable[[Chunk], int]
    learn: Callable[[Chunk, float], Columns]
    facts: Callable[[Chunk], Columns]
    summarise: Callable[[Columns, Columns], dict[str, float]]
    check_start: Callable[[Columns], None] | None
    nothing: str


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
) -> Iterator[StepRecord]:
    """Whole rounds until `max_steps` optimizer steps are reached, yielding a record after each step.

    A round draws `prompts_per_round` of n prompts (over all processes) and then goes over what it drew `passes` times,
    a step for each `prompts_per_step`. A step is the mean loss over all items of all processes. One without items, or
    with a number that is not finite, is skipped everywhere and counted.

    Raises:
        ValueError: settings that do not fit together.
        NothingToLearn, NonFiniteError: so many steps in a row were skipped; the last record has been yielded before.
    """
    _check_settings(n, prompts_per_round, prompts_per_step, passes, max_steps, accelerator)
    require_plain_tools(parameters, lr_scheduler, accelerator)
    tools = {"parameters": parameters, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
    fresh = progress.step == 0
    while progress.step < max_steps:
        samples = samples_at(progress.samples, prompts_per_round, n, seed)
        steps = [samples[i : i + prompts_per_step] for i in range(0, len(samples), prompts_per_step)]
        shares = [_shares(step, prompts_per_chunk, accelerator) for step in steps]
        drawn = [[method.collect(part, progress.samples).to("cpu") for part in share] for share in shares]
        facts = _gather([method.facts(chunk) for chunks in drawn for chunk in chunks], accelerator)
        for number in range(passes * len(steps)):
            chunks = drawn[number % len(steps)]
            last = number + 1 == passes * len(steps)
            consumed = prompts_per_round if last else 0
            total = int(_sum(sum(method.items(chunk) for chunk in chunks), accelerator))
            optimizer.zero_grad(set_to_none=True)
            # Gradients are averaged over the processes, so each must count its items as their number's share.
            factor = accelerator.num_processes / max(total, 1) * (progress.loss_scale or 1.0)
            here = (chunk.to(accelerator.device) for chunk in chunks if method.items(chunk))
            columns = _gather([method.learn(chunk, factor) for chunk in here], accelerator)
            if fresh and total and method.check_start is not None:
                method.check_start(columns)
            fresh = fresh and not total
            if total:
                _fill_gradients(parameters, accelerator)
                outcome = update(
                    columns["loss"], progress, consumed, accelerator=accelerator, max_grad_norm=max_grad_norm, **tools
                )
            else:
                outcome = _skipped(progress, consumed, optimizer)
            progress = outcome.progress
            metrics = method.summarise(columns, facts) | {"items": float(total)} | outcome.metrics()
            yield StepRecord(
                progress.step, samples[-1][0], outcome.loss, metrics, progress, outcome.updated, resumable=last
            )
            if not total and progress.skipped_in_row >= max_skipped_in_row:
                raise NothingToLearn(
                    f"{progress.skipped_in_row} steps in a row had nothing to learn from: {method.nothing}"
                )
            require_finite(outcome, max_skipped_in_row)


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


def _shares(step: list[Sample], prompts_per_chunk: int, accelerator: "Accelerator") -> list[list[Sample]]:
    """This process's prompts of a step, in chunks."""
    share = len(step) // accelerator.num_processes
    mine = step[accelerator.process_index * share : (accelerator.process_index + 1) * share]
    return [mine[i : i + prompts_per_chunk] for i in range(0, len(mine), prompts_per_chunk)]


def _sum(value: float, accelerator: "Accelerator") -> float:
    if accelerator.num_processes == 1:
        return value
    total = accelerator.reduce(torch.tensor(float(value), dtype=torch.float64, device=accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return float(total)


def _gather(parts: list[Columns], accelerator: "Accelerator") -> Columns:
    """The rows of all chunks of all processes, in order, float64 on the CPU; {} when nobody has any."""
    from accelerate.utils import gather_object

    mine: Columns = {
        name: torch.cat([part[name].detach().double().cpu().flatten() for part in parts]) for name in (parts or [{}])[0]
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
