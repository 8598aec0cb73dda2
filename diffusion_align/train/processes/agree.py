"""Collective operations that give every rank the same decision; otherwise some ranks would wait for ever.

A training loop decides here whether to skip, stop, save or halve; it must not branch on what only its own process
knows. Each rank records that it is in a collective operation, so that the others can name a rank that is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from diffusion_align.train.processes.watch import in_collective

if TYPE_CHECKING:
    from accelerate import Accelerator


def max_over_ranks(accelerator: Accelerator, *values: int) -> tuple[int, ...]:
    """The largest of each value over all ranks, equal on all. Without communication if there is one process."""
    if accelerator.num_processes == 1:
        return values
    mine = torch.tensor(values, dtype=torch.int64, device=accelerator.device)
    with in_collective():
        every = accelerator.gather(mine[None])
        assert isinstance(every, torch.Tensor)  # [P, values]
        return tuple(every.amax(0).tolist())


def values_by_rank(accelerator: Accelerator, value: int) -> list[int]:
    """The value of each rank, in the order of ranks, equal on all."""
    if accelerator.num_processes == 1:
        return [value]
    mine = torch.tensor([value], dtype=torch.int64, device=accelerator.device)
    with in_collective():
        every = accelerator.gather(mine)
        assert isinstance(every, torch.Tensor)  # [P]
        return every.tolist()


def on_any_rank(accelerator: Accelerator, *flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is true on any rank."""
    return tuple(bool(value) for value in max_over_ranks(accelerator, *map(int, flags)))


def require_equal_ranks(accelerator: Accelerator, value: int, what: str) -> None:
    """Raise ValueError, on all ranks, unless all have the same value; `what` describes the value and the cure."""
    low, high = max_over_ranks(accelerator, -value, value)
    if -low != high:
        raise ValueError(f"the processes of this job do not agree: {-low} on one and {high} on another, {what}")


def barrier(accelerator: Accelerator) -> None:
    """Wait for all ranks."""
    with in_collective():
        accelerator.wait_for_everyone()


def sum_over_ranks(accelerator: Accelerator, value: int) -> int:
    """The sum of a number over all ranks, equal on all. Without communication if there is one process."""
    if accelerator.num_processes == 1:
        return value
    with in_collective():
        summed = accelerator.reduce(torch.tensor(value, dtype=torch.int64, device=accelerator.device), "sum")
        assert isinstance(summed, torch.Tensor)
        return int(summed)
