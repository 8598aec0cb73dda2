"""Ctrl-C, SIGTERM and SIGUSR1 between two steps instead of inside one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a terminal's, a scheduler's, and Slurm's early warning


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop has stopped, with everything saved; `number` is the signal's."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number


class Interruptible:
    """Within this context the first signal only sets `asked`, so that the step in hand can be finished and saved.

    `asked` is the signal's number, or 0. A second signal interrupts at once. Outside the main thread, where no signals
    arrive, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._before = {}

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Interrupted("a second signal: stopped at once, nothing saved since the last checkpoint", number)
        self.asked = number

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
