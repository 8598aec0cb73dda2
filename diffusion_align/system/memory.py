"""When the device's memory runs out: know it, and do the same work in smaller parts."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

Part = TypeVar("Part")
CURE = (
    "the three cheapest ways on: --gradient_checkpointing; --mixed_precision bf16; fewer pictures at a time "
    "(halve --train_batch_size and double --gradient_accumulation_steps; online: halve --sample_chunk, or --group_size)"
)
logger = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """Memory ran out although the work could not be cut any smaller; the message names the cheapest cures."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own for GPUs, or its CPU allocator's."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def free() -> None:
    """Give back what a failed attempt held. Call it behind the `except`, not in it: there the error's traceback still
    holds the tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_parts(work: Callable[[slice], Part], count: int, size: int, what: str) -> tuple[list[Part], int]:
    """`work` on rows 0..count-1, `size` at a time, in order; where memory runs out, half as many from there on. The
    size that was left comes second.

    Raises:
        OutOfMemory: one row alone does not fit; `what` names the work.
    """
    done: list[Part] = []
    start = 0
    while start < count or not done:  # no rows are still a piece of work, of no rows
        try:
            part = work(slice(start, min(start + size, count)))
        except RuntimeError as error:
            if not ran_out(error):
                raise
            part = None
        if part is not None:
            done.append(part)
            start += size
            continue
        free()
        size = halved(min(size, count - start), what)
    return done, size


def halved(size: int, what: str) -> int:
    """Half of a number of rows that did not fit, with a word about it; OutOfMemory for one row."""
    if size <= 1:
        raise OutOfMemory(f"{what}: out of memory with one at a time; {CURE}")
    logger.warning("%s: out of memory with %d at a time; going on with %d", what, size, (size + 1) // 2)
    return (size + 1) // 2
