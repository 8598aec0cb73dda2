"""Hostile files, and the commands that a user would give them to.

A case writes its files into a folder and returns the command line. If its code ran, it would create a canary file. Each
case runs in a fork, so that one that hangs or takes too much memory is noticed and killed.
"""

import contextlib
import io
import json
import os
import pickle
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 60
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Trap:
    """Code for hostile files, in several forms; each would create the canary."""

    canary: Path

    @property
    def command(self) -> str:
        return f"touch {self.canary}"

    @property
    def python(self) -> str:
        """The text of a module that acts when imported."""
        return f"open({str(self.canary)!r}, 'w').close()\n"

    def __reduce__(self):
        return os.system, (self.command,)


class Evaluated(Trap):
    """The same through `eval`."""

    def __reduce__(self):
        return eval, (f"__import__('os').system({self.command!r})",)  # pickled only, never called here


Case = Callable[[Path, Trap], list[str]]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    """Register a case under its function's name."""
    CASES[make.__name__.replace("_", " ")] = make
    return make


def write(path: Path, data: bytes | str | object) -> Path:
    """Write bytes, text, or anything else as JSON; replaces a file or link, never what a link points to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    text = data if isinstance(data, bytes | str) else json.dumps(data)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@dataclass(frozen=True)
class Outcome:
    """`code` is the command's, None if the process died or was killed; `errors` are its error lines."""

    name: str
    ran: bool
    code: int | None
    errors: list[str]
    seconds: float
    grown_mib: float

    def fault(self, mib: float) -> str | None:
        """What is wrong; None if no code ran and the command gave one error line, or did its own work."""
        if self.ran:
            return "THE CANARY IS THERE"
        if self.code is None:
            return f"the process died, or was ended after {LIMIT_S} s"
        if self.grown_mib > mib:
            return f"{self.grown_mib:.0f} MiB of memory"
        if self.code and (len(self.errors) != 1 or "Traceback" in self.errors[0]):
            return f"{len(self.errors)} lines of error: {self.errors[:2]}"
        if any(not character.isprintable() for line in self.errors for character in line):
            return f"unprintable: {self.errors[0]!r}"
        return None


def import_all() -> None:
    """Import what the commands need, once before the forks."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's client reads it when it is imported
    import diffusers  # noqa: F401
    import open_clip  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import diffusion_align.commands.annotate.command
    import diffusion_align.commands.data.check
    import diffusion_align.commands.evaluate.command
    import diffusion_align.commands.reward.score
    import diffusion_align.commands.sample.command
    import diffusion_align.commands.train.train  # noqa: F401

    torch.set_num_threads(1)


def run_case(name: str, folder: Path) -> Outcome:
    """Make a case's files and run its command in a fork; `folder` is its own."""
    trap = Trap(folder / "canary")
    home = folder / "files"
    home.mkdir(parents=True)
    argv = CASES[name](home, trap)
    report, start = folder / "report.json", time.monotonic()
    child = os.fork()
    if child == 0:
        _in_child(argv, home, report)
    status = _wait(child)
    said = json.loads(report.read_text()) if status == 0 and report.exists() else {}
    lines = [line for line in said.get("err", "").splitlines() if ": error: " in line]
    left = trap.canary.exists() or any(path.name == "canary" for path in folder.rglob("canary"))
    return Outcome(name, left, said.get("code"), lines, time.monotonic() - start, said.get("grown", 0.0))


def _in_child(argv: list[str], home: Path, report: Path) -> None:
    """Never returns."""
    from diffusion_align.cli import main

    os.chdir(home)
    # Where loaders keep code that they have fetched.
    os.environ["HF_MODULES_CACHE"] = str(home / "modules")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    report.write_text(json.dumps({"code": code, "err": out.getvalue(), "grown": grown}))
    os._exit(0)


def _wait(child: int) -> int:
    """The child's status; it is killed after the limit."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def traps_work() -> bool:
    """Whether loading the pickles would create the canaries; otherwise the cases would show nothing."""
    with tempfile.TemporaryDirectory() as name:
        found = []
        for kind in (Trap, Evaluated):
            trap = kind(Path(name) / kind.__name__)
            pickle.loads(pickle.dumps(trap))
            found.append(trap.canary.exists())
    return all(found)
