"""stdout and stderr that never end a run: characters that the console lacks, a closed pipe (`| head -1`) or terminal, a
full disk, no output at all. In a log file the progress bars of libraries become lines.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from time import monotonic
from typing import Any, TextIO

FULL = (errno.ENOSPC, errno.EDQUOT)  # space may become free later
BETWEEN = 30.0  # seconds between two lines of a bar in a log file
SHORT = 2.0  # seconds; shorter work gets no line


class TolerantStream:
    """A stream whose writes never raise OSError; `refused` is the error if its disk is full."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.refused: OSError | None = None
        self._bar = None if stream.isatty() else _BarAsLines()

    def write(self, text: str) -> int:
        size = len(text)
        if self._bar is not None:
            text = self._bar.lines(text)
        with self._tolerate_errors():
            self.stream.write(text)
        return size

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._tolerate_errors():
            self.stream.flush()

    def end(self) -> None:
        """Flush; discard what cannot be written, which would fail again when Python exits."""
        self.flush()
        try:
            self.stream.flush()
        except OSError:
            self._redirect_to_null()

    @contextlib.contextmanager
    def _tolerate_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                self.refused = error  # the next flush writes the buffer again
            else:
                self._redirect_to_null()

    def _redirect_to_null(self) -> None:
        # The next flush writes the buffer again, so the file descriptor must accept it.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _BarAsLines:
    """Turns a library's progress bar, which starts each update with a carriage return, into a line now and then."""

    def __init__(self) -> None:
        self.held: str | None = None  # the latest update, while a bar is open
        self.begun = self.written = 0.0

    def lines(self, text: str) -> str:
        """What to write instead of `text`; text that is no bar stays as it is."""
        if text.startswith("\r") and not text.startswith("\r\n"):
            now = monotonic()
            if self.held is None:
                self.begun, self.written = now, now - BETWEEN + SHORT
            self.held = text.rsplit("\r", 1)[1].strip()
            if now - self.written < BETWEEN or not self.held:
                return ""
            self.written = now
            return f"{self.held}\n"
        if text == "\n" and self.held is not None:  # the bar is closed
            last, self.held = self.held, None
            return f"{last}\n" if last and monotonic() - self.begun >= SHORT else ""
        return text


@contextlib.contextmanager
def tolerant_output() -> Iterator[TolerantStream]:
    """Within it, stdout and stderr write characters that their encoding lacks as \\xNN or \\uNNNN, and never raise
    because their reader has gone or the disk is full. Either may be missing, as under a service manager.

    Yields the replacement of stdout.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        made = []
        for stream in before:
            if stream is None:
                stream = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
            elif hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
            made.append(TolerantStream(stream))
        sys.stdout, sys.stderr = made  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield made[0]
        finally:
            for stream in made:
                stream.end()
            sys.stdout, sys.stderr = before
