"""What one process finds out and all must act on: a single reduced decision, or the others would wait for ever.

Every skip, stop, save and cut of a training loop is decided here; nothing in a loop may branch on what only its own
process knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


def most(accelerator: Accelerator, *values: int) -> tuple[int, ...]:
    """The largest of each value over all processes, alike on each. With one process it costs nothing."""
    if accelerator.num_processes == 1:
        return values
    mine = torch.tensor(values, dtype=torch.int64, device=accelerator.device)
    every = accelerator.gather(mine[None])
    assert isinstance(every, torch.Tensor)  # [P, values]
    return tuple(every.amax(0).tolist())


def anywhere(accelerator: Accelerator, *flags: bool) -> tuple[bool, ...]:
    """Whether each is so on any process."""
    return tuple(bool(value) for value in most(accelerator, *map(int, flags)))
