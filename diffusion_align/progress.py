"""Progress bars: on a terminal as tqdm draws them, in a log file one plain line at a time.

A log file that is written like a terminal becomes a single line of thousands of bars. There, each bar writes a line at
most every half minute, and one when it ends; work that takes two seconds or less writes nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS = 30.0  # between two lines of a log file
SHORT = 2.0  # seconds of work that are not worth a line
LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
OPEN_LINE = "{desc}: {n_fmt} [{elapsed}, {rate_fmt}{postfix}]"


class _Lines:
    """A text stream for tqdm that ends each of its updates with a line break instead of a carriage return."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.begun = time.monotonic()
        self.last = ""

    def write(self, text: str) -> None:
        text = text.replace("\r", "").strip()
        if text and text != self.last and time.monotonic() - self.begun >= SHORT:
            self.last = text
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(
    items: Iterable[Any] | None = None, *, desc: str, unit: str, total: int | None = None, initial: int = 0,
    hidden: bool = False,
) -> tqdm[Any]:  # fmt: skip
    """A bar on stderr, with the time that is left where `total` is known; iterate over it, or call `update`.

    `hidden`: show nothing, for the ranks other than the first.
    """
    if sys.stderr.isatty() or hidden:
        return tqdm(items, desc=desc, unit=unit, total=total, initial=initial, disable=hidden, dynamic_ncols=True)
    known = total is not None or hasattr(items, "__len__")
    return tqdm(
        items, desc=desc, unit=unit, total=total, initial=initial, file=_Lines(sys.stderr), mininterval=SECONDS,
        maxinterval=SECONDS, ascii=True, bar_format=LINE if known else OPEN_LINE,
    )  # fmt: skip
