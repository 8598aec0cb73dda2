"""Progress bars: tqdm's own on a terminal, plain lines in a log file, where tqdm would write thousands of bars.

In a log file a bar writes its first line after two seconds, then one at most every half minute, and one when it ends;
shorter work writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TextIO, TypeVar

from tqdm import tqdm

from .consoles import BETWEEN, SHORT

BAR = "{l_bar}{bar}| {done}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
LINE = "{desc}: {percentage:.0f} %, {done} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
OPEN_LINE = "{desc}: {done} [{elapsed}, {rate_fmt}{postfix}]"

P = ParamSpec("P")
T = TypeVar("T")


class _Bar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
    """A bar that may advance by fractions of a unit; `done` in its format is the count, to a tenth."""

    @property
    def format_dict(self) -> Any:
        n = round(self.n, 6)  # the sum of fractions may be off in its last bits
        return {**super().format_dict, "n": n, "done": f"{n:.1f}".removesuffix(".0")}


class _Lines:
    """A text stream for tqdm that ends each of its updates with a line break instead of a carriage return."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.last = ""

    def write(self, text: str) -> None:
        text = text.replace("\r", "").strip()
        if text and text != self.last:
            self.last = text
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(
    items: Iterable[Any] | None = None, *, desc: str, unit: str, total: int | None = None, initial: int = 0,
    hidden: bool = False,
) -> tqdm[Any]:  # fmt: skip
    """A bar on stderr, with the remaining time if `total` is known; iterate over it, or call `update`.

    `hidden` shows nothing, for ranks other than 0.
    """
    known = total is not None or hasattr(items, "__len__")
    if sys.stderr.isatty() or hidden:
        return _Bar(
            items, desc=desc, unit=unit, total=total, initial=initial, disable=hidden, dynamic_ncols=True,
            bar_format=BAR if known else None,
        )  # fmt: skip
    # Smoothing would mistake the time before the first line for a slow step; a mean over all steps does not.
    bar = _Bar(
        items, desc=desc, unit=unit, total=total, initial=initial, file=_Lines(sys.stderr), mininterval=BETWEEN,
        maxinterval=BETWEEN, miniters=1e-9, delay=SHORT, smoothing=0, ascii=True,
        bar_format=LINE if known else OPEN_LINE,
    )  # fmt: skip
    bar.last_print_t -= BETWEEN - SHORT
    return bar


def counted(function: Callable[P, T], done: Callable[[], object]) -> Callable[P, T]:
    """The same function, but each call ends with `done()`, so that slow work can show its progress within a batch."""

    def call(*args: P.args, **named: P.kwargs) -> T:
        result = function(*args, **named)
        done()
        return result

    return call


@contextmanager
def total_bar(what: str, total: int, unit: str, show: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr. Yields a function that takes the number of items that all ranks have done."""
    if not show:
        # Not even a disabled bar: if a forked process is killed while it holds tqdm's lock, all others are blocked.
        yield lambda done: None
        return
    with progress_bar(total=total, desc=what, unit=unit) as bar:
        yield lambda done: bar.update(done - bar.n)
