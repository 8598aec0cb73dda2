"""Recognises that the device's memory ran out, and repeats the same work in smaller chunks."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
logger = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """Memory ran out, and the work cannot be split further; the message names the work."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out: torch's own class for GPUs, or its CPU allocator's message."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def free() -> None:
    """Free what a failed attempt held. Call it after the `except` block: within, the traceback still holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_parts(work: Callable[[slice], T], count: int, size: int, what: str) -> tuple[list[T], int]:
    """Results of `work` on rows 0..count-1 in order, `size` at a time, and the last size: halved when memory ran out.

    Raises:
        OutOfMemory: a single row does not fit; `what` names the work.
    """
    done: list[T] = []
    start = 0
    while start < count or not done:  # call once even if there are no rows
        try:
            done.append(work(slice(start, min(start + size, count))))
            start += size
            continue
        except RuntimeError as error:
            if not ran_out(error):
                raise
        free()
        size = halved(min(size, count - start), what)
    return done, size


def halved(size: int, what: str) -> int:
    """Half of a number of rows that did not fit, with a warning; raises OutOfMemory for one row."""
    if size <= 1:
        raise OutOfMemory(f"{what}: out of memory with one at a time")
    logger.warning("%s: out of memory with %d at a time; going on with %d", what, size, (size + 1) // 2)
    return (size + 1) // 2
