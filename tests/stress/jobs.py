"""Jobs of several processes, forked after import, joined by gloo and watched by a launcher; `Fault` makes one fail.

The launcher does what torchrun does: when one process fails, the others get SIGTERM and, after a while, SIGKILL.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers_machine import free_port
from helpers_train import _join as join_ranks

from diffusion_align.commands.train import encode
from diffusion_align.commands.train import train as training
from diffusion_align.methods.shared.online_setup import OnlineSetup
from diffusion_align.train import collect, rounds, steps
from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.processes import watch
from stress.runs import train

# Seconds until a job counts as hung, from SIGTERM to SIGKILL, and between two polls. The first two only bound jobs that
# never end, however busy the machine; the stress programs print how long jobs take.
LIMIT, GRACE, POLL = 600.0, 60.0, 0.1


@dataclass
class Ended:
    """A job that has ended: exit codes (-9: killed), the output of each process, and seconds."""

    codes: list[int]
    said: list[str]
    seconds: float
    hung: bool

    @property
    def text(self) -> str:
        return "\n".join(self.said)


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one process: `kind`, when it first does `doing` in `step` or later."""

    kind: str = "none"
    rank: int = 0
    step: int = 3
    doing: str = "learning"


def launch(
    count: int,
    work: Callable[[int], int],
    folder: Path,
    meanwhile: Callable[[list[int]], None] | None = None,
    patience: float = 0.0,
) -> Ended:
    """Run `work(rank)`, which returns an exit code, in forked processes; `meanwhile` is called with their ids.

    `patience`: seconds from a failure to the others' SIGTERM.
    """
    port, begun = free_port(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    children = [_fork(rank, count, port, work, folder / f"rank-{rank}.txt") for rank in range(count)]
    if meanwhile is not None:
        meanwhile(children)
    codes: dict[int, int] = {}
    terminated = failed = float("inf")  # when
    hung = False
    while len(codes) < count:
        for rank, child in enumerate(children):
            if rank not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if any(codes.values()):
            failed = min(failed, now)
        if now - failed >= patience and terminated > now:
            terminated = now
            _signal(children, codes, signal.SIGTERM)
        if now - begun > LIMIT:
            hung = True
        if hung or now - terminated > GRACE:
            _signal(children, codes, signal.SIGKILL)
        time.sleep(POLL)
    said = [(folder / f"rank-{rank}.txt").read_text(errors="replace") for rank in range(count)]
    return Ended([codes[rank] for rank in range(count)], said, time.monotonic() - begun, hung)


def _signal(children: list[int], codes: dict[int, int], number: int) -> None:
    for rank, child in enumerate(children):
        if rank not in codes:
            os.kill(child, number)


def _fork(rank: int, count: int, port: int, work: Callable[[int], int], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = log.open("w")  # and, below, what writes to the file descriptors
        os.dup2(sys.stderr.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        join_ranks(rank, count, port)
        code = work(rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(argv: list[str], fault: Fault | None = None) -> Callable[[int], int]:
    """What each process runs: this command line, with a fault in one of them."""

    def work(rank: int) -> int:
        if fault is not None and rank == fault.rank:
            FAULTS[fault.kind](fault)
        code, said = train(argv)
        print(said, file=sys.stderr)
        return code

    return work


def step_now() -> int:
    """The last step in this process's note."""
    return 0 if watch._watch is None else watch._watch.note.step


def _at(fault: Fault, action: Callable[[], None]) -> None:
    """Call `action` when this process begins what the fault names, in its step or later."""

    def record_activity(what: str, step: int | None = None) -> None:
        watch.record_activity(what, step)
        if what == fault.doing and step_now() >= fault.step:
            action()

    steps.record_activity = rounds.record_activity = collect.record_activity = record_activity


def _raise_in_loss(fault: Fault) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("the loss was made to fail")

    def patch() -> None:
        steps._try_step = rounds._try_chunks = broken

    _at(fault, patch)


def reward_by(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Apply `change` to this process's rewards."""
    real = OnlineSetup.picture_score

    def changed(self: OnlineSetup) -> Any:
        score = real(self)
        return lambda latents, prompts: change(score(latents, prompts))

    OnlineSetup.picture_score = changed


def _raise_in_reward(fault: Fault) -> None:
    def broken(values: torch.Tensor) -> torch.Tensor:
        if step_now() >= fault.step:
            raise ValueError("the reward was made to fail")
        return values

    reward_by(broken)


def _bad_rows(fault: Fault) -> None:
    def read(*_: Any, **__: Any) -> Any:
        raise ValueError("3 of 10 rows are bad, more than max_bad_fraction 0.01")

    if fault.doing == "reading":
        training.read_items = read
    else:
        encode.build_cache = read


def _full_disk(fault: Fault) -> None:
    """Checkpoints fail from the given step on, for three saves."""
    failures, real = [], checkpoint.write_tensors

    def full(*args: Any) -> None:
        if len(failures) < 3 and step_now() >= fault.step:
            failures.append(0)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    checkpoint.write_tensors = full


def _no_part(_: Fault) -> None:
    def fails(*_: Any) -> Path:
        raise checkpoint.CheckpointError("round_1: could not be saved (No space left on device)")

    checkpoint.write_part = fails


FAULTS: dict[str, Callable[[Fault], None]] = {
    "kill": lambda fault: _at(fault, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "stall": lambda fault: _at(fault, lambda: time.sleep(600)),
    "signal": lambda fault: _at(fault, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "loss": _raise_in_loss,
    "reward": _raise_in_reward,
    "ties": lambda _: reward_by(torch.zeros_like),
    "rows": _bad_rows,
    "disk": _full_disk,
    "part": _no_part,
}


@dataclass
class Tally:
    """Counts of what was tried, and a line for each thing that went wrong."""

    tried: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def check(self, name: str, problems: list[str], seconds: float = 0.0) -> None:
        self.tried[name] = self.tried.get(name, 0) + 1
        self.wrong += [f"{name}: {problem}" for problem in problems]
        self.slowest = max(self.slowest, seconds)


@contextmanager
def timed(name: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    print(f"  {name}: {time.monotonic() - begun:.0f} s", flush=True)
