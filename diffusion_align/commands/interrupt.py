"""Delays Ctrl-C, SIGTERM and SIGUSR1 until the end of the current step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # from a terminal, a scheduler, and Slurm before its limit


# Seconds within which a repeated signal counts as the first one: under a launcher, which repeats it, and alone.
LAUNCHED, ALONE = 5.0, 0.5


class Interrupted(KeyboardInterrupt):
    """A run has stopped after a signal, with everything saved; `number` is the signal's."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number


class Interruptible:
    """In this context the first signal only sets `signal_number` (0 before), so that the current step can be saved.

    A second signal interrupts at once if it comes at least `grace` seconds later: a scheduler sends SIGTERM to a
    launcher and to its workers, and the launcher sends it to them again. Python handles a signal only when the current
    call returns, which may take longer than `grace` (the backward pass of a large model on a CPU). So the first
    repetition of the first signal never interrupts if one is expected: for SIGTERM, and for any signal under a
    launcher. Outside the main thread, which gets no signals, the context does nothing.
    """

    def __init__(
        self, grace: float | None = None, clock: Callable[[], float] = time.monotonic, launched: bool | None = None
    ) -> None:
        self.signal_number = 0
        self._before = {}
        self._launched = "LOCAL_RANK" in os.environ if launched is None else launched
        self._grace = (LAUNCHED if self._launched else ALONE) if grace is None else grace
        self._repeated = False
        self._clock = clock
        self._first = 0.0

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.signal_number:
            self.signal_number, self._first = number, self._clock()
            return
        expected = number == self.signal_number and not self._repeated and (self._launched or number == signal.SIGTERM)
        self._repeated = self._repeated or number == self.signal_number
        if not expected and self._clock() - self._first >= self._grace:
            raise Interrupted("a second signal: stopped at once, nothing saved since the last checkpoint", number)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
