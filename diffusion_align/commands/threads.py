"""How many CPU threads torch uses: one for each core that other programs leave free.

Torch's threads wait for one another at the end of every parallel region, thousands of times per training step. If a
thread shares a core with another program, each wait can last as long as the operating system's time slice, and a step
takes 7 to 40 times as long (docs/performance.md). With as many threads as free cores it takes about twice as long.

The number of threads affects the rounding of sums, so it is recorded in every row of metrics.jsonl and in each
checkpoint, and a resumed run uses the same number.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WINDOW = 10.0  # seconds over which the load of other programs is averaged
CALM = 6  # windows in a row with a free core before a thread is added: about a minute
CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Usage:
    """CPU seconds used so far on the cores that this process may use: by all programs, and by this one."""

    at: float
    everyone: float
    own: float


def usage() -> Usage:
    """Read the system's counters, without programs at low priority (nice), which yield to others."""
    import psutil

    mine = psutil.Process().cpu_times()
    allowed, cores = _allowed(), psutil.cpu_times(percpu=True)
    idle = ("idle", "iowait", "nice", "guest", "guest_nice")  # guest time is part of user time already
    everyone = sum(
        sum(seconds for name, seconds in core._asdict().items() if name not in idle)
        for number, core in enumerate(cores)
        if number in allowed
    )
    return Usage(time.monotonic(), everyone, mine.user + mine.system)


def others(before: Usage, after: Usage) -> float:
    """How many cores other programs kept busy between two readings, on average."""
    passed = max(after.at - before.at, 1e-3)
    return max(0.0, (after.everyone - before.everyone) - (after.own - before.own)) / passed


def cores() -> int:
    """Cores that this process may use, by its affinity mask and the quota of its container."""
    count = len(_allowed())
    try:
        quota, period = CGROUP_LIMIT.read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # not Linux, or no such group
        return count
    return count if quota == "max" else max(1, min(count, math.ceil(int(quota) / int(period))))


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def fitting(most: int, cores: int, busy: float) -> int:
    """Threads for `cores` cores of which others keep `busy` busy: at most `most`, and at least 1.

    A load below half a core is ignored: it costs less than one thread fewer would.

    >>> fitting(2, 2, busy=0.2), fitting(2, 2, busy=0.9), fitting(8, 16, busy=3.1), fitting(4, 4, busy=9.0)
    (2, 1, 8, 1)
    """
    return max(1, min(most, cores - round(busy)))


STARTED: list[Usage] = []  # the reading that the command made before its heavy imports


def record_usage() -> None:
    """Read the counters, so that the load of other programs is measured during the import of torch."""
    STARTED[:] = [usage()]


@dataclass(eq=False)
class Threads:
    """The threads of this process. chosen: whether their number may be adjusted; not if the user set it. most: torch's
    default."""

    count: int
    chosen: bool
    most: int
    cores: int
    read: Callable[[], Usage]
    apply: Callable[[int], None]
    seen: Usage = field(init=False)
    calm: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.seen = self.read()
        self.apply(self.count)

    def adjust(self) -> str | None:
        """Compare threads with free cores, every ten seconds; call it between steps. A sentence after a change."""
        if not self.chosen or self.most == 1:
            return None
        now = self.read()
        if now.at - self.seen.at < WINDOW:
            return None
        busy, self.seen = others(self.seen, now), now
        wanted = fitting(self.most, self.cores, busy)
        self.calm = self.calm + 1 if wanted > self.count else 0
        if wanted < self.count or self.calm >= CALM:
            before, self.count, self.calm = self.count, wanted, 0
            self.apply(wanted)
            return f"other programs use {busy:.1f} of {self.cores} cores: {wanted} CPU threads, {before} before"
        return None


def set_threads(
    option: int | None = None,
    resumed: int | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
    say: Callable[[str], None] = print,
) -> Threads:
    """Set the number of torch's threads, and print it if it is not torch's default.

    In this order: `option`, the environment that the user or the launcher set, `resumed` (the number in the checkpoint
    of a resumed run), or the cores that other programs have left free since `record_usage`.
    """
    import torch

    most = torch.get_num_threads()
    by_environment = any(environment.get(name) for name in SET_BY_USER)
    if option is not None or by_environment:
        count = most if option is None else option
        return Threads(count, False, count, cores(), usage, _apply)
    here = cores()
    if resumed is not None:
        count, reason = min(resumed, here), "as when the checkpoint was saved"
    else:
        busy = others(STARTED[0], usage()) if STARTED else 0.0
        count, reason = fitting(min(most, here), here, busy), f"as other programs use {busy:.1f} of {here} cores"
    if count != most:
        say(f"{count} CPU thread{'s' * (count > 1)}, {reason} (--threads N sets another number)")
    return Threads(count, True, max(count, min(most, here)), here, usage, _apply)


def _apply(count: int) -> None:
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
