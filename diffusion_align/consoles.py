"""Output that cannot end a run: a character that the console lacks, or a reader that has left (`| head -1`)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Patient:
    """A stream whose reader may leave: from then on what is written goes nowhere, and the work goes on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with self._left():
            self.stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._left():
            self.stream.flush()

    @contextlib.contextmanager
    def _left(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # The buffer of the stream is written again at its next flush, so its file must be one that takes it.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Within it, stdout and stderr show characters that their encoding lacks as \\xNN or \\uNNNN, and take whatever
    is written when nobody reads any more."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout, sys.stderr = (_Patient(stream) for stream in before)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
