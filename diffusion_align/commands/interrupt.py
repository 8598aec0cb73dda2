"""Ctrl-C and SIGTERM between two steps instead of inside one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interruptible:
    """Within this context the first signal only sets `asked`, so that the step in hand can be finished and saved.

    A second one interrupts at once, as ever. Outside the main thread, where no signals arrive, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before = {}

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
