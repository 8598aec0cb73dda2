"""Work ahead in the background: while the consumer is busy with one item, the next ones are made."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")
_POLL = 0.1  # seconds after which a worker whose consumer has left notices


def prefetch(items: Iterable[Item], ahead: int = 2) -> Iterator[Item]:
    """The items in their order, made by one thread that is at most `ahead` finished ones in front.

    It pays where making an item leaves the interpreter's lock alone (decoding and resizing of pictures, reading files)
    or the consumer does (a GPU). An exception of `items` is raised here, after the items before it. Whoever stops
    early, by `close()` or by dropping the generator, stops the thread too, at its next item. The current CUDA device is
    that of the consumer: a new thread would begin on GPU 0.

    Raises:
        ValueError: `ahead` is less than 1.
    """
    if ahead < 1:
        raise ValueError(f"ahead is at least 1, not {ahead}")
    return _consume(items, ahead)


def _consume(items: Iterable[Item], ahead: int) -> Iterator[Item]:
    ready: queue.Queue[tuple[bool, object]] = queue.Queue(ahead)
    left = threading.Event()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def put(more: bool, value: object) -> bool:
        """False when nobody is there to take it."""
        while not left.is_set():
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
        except BaseException as error:  # whatever it was, the consumer is told rather than left waiting
            put(False, error)

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
        left.set()
