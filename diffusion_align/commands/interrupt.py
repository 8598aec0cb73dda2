"""Ctrl-C, SIGTERM and SIGUSR1 between two steps instead of inside one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a terminal's, a scheduler's, and Slurm's early warning


# Seconds in which a repeated signal is still the first one: under a launcher, which repeats it, and alone.
LAUNCHED, ALONE = 5.0, 0.5


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop has stopped, with everything saved; `number` is the signal's."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number


class Interruptible:
    """Within this context the first signal only sets `signal_number`, so that the step in hand can be finished and saved.

    `signal_number` is the signal's number, or 0. A second signal interrupts at once, if it comes `grace` seconds later or more:
    a scheduler sends SIGTERM to a launcher and to its workers, and the launcher passes it on to them again. Python
    notices a signal only when the call in hand ends, which may take longer than `grace` (the backward pass of a large
    model on a CPU). So the first repetition of the first signal, where one is to be expected, is always that signal:
    of SIGTERM, and of any signal under a launcher. Outside the main thread, where no signals arrive, it does nothing.
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
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
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
