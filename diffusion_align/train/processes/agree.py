"""What one process finds out and all must act on: a single reduced decision, or the others would wait for ever.

Every skip, stop, save and cut of a training loop is decided here; nothing in a loop may branch on what only its own
process knows. That a process has come here is noted, so that the others can name who has not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from diffusion_align.train.processes.watch import waiting

if TYPE_CHECKING:
    from accelerate import Accelerator


def max_over_ranks(accelerator: Accelerator, *values: int) -> tuple[int, ...]:
    """The largest of each value over all processes, alike on each. With one process it costs nothing."""
    if accelerator.num_processes == 1:
        return values
    mine = torch.tensor(values, dtype=torch.int64, device=accelerator.device)
    with waiting():
        every = accelerator.gather(mine[None])
        assert isinstance(every, torch.Tensor)  # [P, values]
        return tuple(every.amax(0).tolist())


def values_by_rank(accelerator: Accelerator, value: int) -> list[int]:
    """What each process has, in their order, alike on each."""
    if accelerator.num_processes == 1:
        return [value]
    mine = torch.tensor([value], dtype=torch.int64, device=accelerator.device)
    with waiting():
        every = accelerator.gather(mine)
        assert isinstance(every, torch.Tensor)  # [P]
        return every.tolist()


def on_any_rank(accelerator: Accelerator, *flags: bool) -> tuple[bool, ...]:
    """Whether each is so on any process."""
    return tuple(bool(value) for value in max_over_ranks(accelerator, *map(int, flags)))


def require_equal_ranks(accelerator: Accelerator, value: int, what: str) -> None:
    """Raise ValueError, on every process, unless all have the same value; `what` says of what, and the cure."""
    low, high = max_over_ranks(accelerator, -value, value)
    if -low != high:
        raise ValueError(f"the processes of this job do not agree: {-low} on one and {high} on another, {what}")


def barrier(accelerator: Accelerator) -> None:
    """Wait until all processes are here."""
    with waiting():
        accelerator.wait_for_everyone()


def sum_over_ranks(accelerator: Accelerator, value: int) -> int:
    """The sum of a number over all processes, alike on each. With one process it costs nothing."""
    if accelerator.num_processes == 1:
        return value
    with waiting():
        summed = accelerator.reduce(torch.tensor(value, dtype=torch.int64, device=accelerator.device), "sum")
        assert isinstance(summed, torch.Tensor)
        return int(summed)
