"""Output that cannot end a run: a character that the console lacks, a reader that has left (`| head -1`), a terminal
that was closed, a log on a full disk, no output at all. Bars that libraries draw become lines in a log file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from time import monotonic
from typing import Any, TextIO

FULL = (errno.ENOSPC, errno.EDQUOT)  # there may be room again later
BETWEEN = 30.0  # seconds between two lines of a bar in a log file
SHORT = 2.0  # seconds of work that are not worth a line


class Patient:
    """A stream that may refuse what is written: the work goes on. `refused` says why the last text was not taken."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.refused: OSError | None = None
        self._bar = None if stream.isatty() else _Bar()

    def write(self, text: str) -> int:
        size = len(text)
        if self._bar is not None:
            text = self._bar.lines(text)
        with self._going_on():
            self.stream.write(text)
        return size

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._going_on():
            self.stream.flush()

    def end(self) -> None:
        """Leave nothing in the stream's buffer that would fail again when Python exits."""
        self.flush()
        try:
            self.stream.flush()
        except OSError:
            self._write_nowhere()

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                self.refused = error  # the buffer is written again at the next flush
            else:
                self._write_nowhere()

    def _write_nowhere(self) -> None:
        # The buffer of the stream is written again at its next flush, so its file must be one that takes it.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Bar:
    """What a bar of a library writes, which returns the carriage for each update, as a line now and then."""

    def __init__(self) -> None:
        self.held: str | None = None  # the latest update, while a bar is open
        self.begun = self.told = 0.0

    def lines(self, text: str) -> str:
        """What to write in place of `text`; all other text stays as it is."""
        if text.startswith("\r") and not text.startswith("\r\n"):
            now = monotonic()
            if self.held is None:
                self.begun, self.told = now, now - BETWEEN + SHORT
            self.held = text.rsplit("\r", 1)[1].strip()
            if now - self.told < BETWEEN or not self.held:
                return ""
            self.told = now
            return f"{self.held}\n"
        if text == "\n" and self.held is not None:  # the bar is closed
            last, self.held = self.held, None
            return f"{last}\n" if last and monotonic() - self.begun >= SHORT else ""
        return text


@contextlib.contextmanager
def steady() -> Iterator[Patient]:
    """Within it, stdout and stderr show characters that their encoding lacks as \\xNN or \\uNNNN, and take whatever
    is written though nobody reads it any more or the disk is full. Either may be missing, as under a service.

    Yields what stands in for stdout.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        made = []
        for stream in before:
            if stream is None:
                stream = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
            elif hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
            made.append(Patient(stream))
        sys.stdout, sys.stderr = made  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield made[0]
        finally:
            for patient in made:
                patient.end()
            sys.stdout, sys.stderr = before
