"""Make the next items in a background thread while the caller uses the present one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")
_POLL = 0.1  # seconds between two looks of the thread whether the caller still wants items


def prefetch(items: Iterable[Item], ahead: int = 2) -> Iterator[Item]:
    """Yield the items in order, while one thread makes up to `ahead` of them in advance.

    This saves time if making an item, or using it, releases the interpreter's lock: decoding pictures, reading files,
    waiting for a GPU or a server. An exception of `items` is raised here, after the items before it. Closing or
    dropping the generator stops the thread at its next item. The thread uses the caller's current CUDA device; a new
    thread would use GPU 0.

    Raises:
        ValueError: `ahead` is less than 1.
    """
    if ahead < 1:
        raise ValueError(f"ahead is at least 1, not {ahead}")
    return _consume(items, ahead)


def _consume(items: Iterable[Item], ahead: int) -> Iterator[Item]:
    ready: queue.Queue[tuple[bool, object]] = queue.Queue(ahead)
    stopped = threading.Event()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def put(more: bool, value: object) -> bool:
        """Wait for room in the queue; False if the caller has stopped."""
        while not stopped.is_set():
            try:
                ready.put((more, value), timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            for item in items:
                if not put(True, item):
                    return
            put(False, None)
        except BaseException as error:  # raised in the caller, which would otherwise wait for ever
            put(False, error)

    # A daemon: an executor's thread would keep a process that ends alive until its item is made.
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if more:
                yield value  # pyright: ignore[reportReturnType]
            elif isinstance(value, BaseException):
                raise value
            else:
                return
    finally:
        stopped.set()
