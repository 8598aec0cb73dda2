"""Kills and errors before each file operation of a save.

Python reports its file operations to an audit hook, whatever function they come from, so no function is overlooked.
"""

import errno
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from diffusion_align.train.checkpoints.store import CheckpointError, latest_good, save, write_part
from stress.checkpoint.kills import base, content, ended, in_child, is_content, is_intact

OPERATIONS = {
    "open", "os.chmod", "os.fsync", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir",
    "safetensors.save_file", "shutil.rmtree",
}  # fmt: skip
CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES)
SMALL = base(1000)
WAYS = ("next", "again", "parts")
"""A save after that of step 1: of the next step, of the same step again, of the next with another process's data."""

_UNTOUCHED, _REPORTED, _SAVED = 0, 1, 2  # exit codes of a child: how its save ended


def before_operations(act: Callable[[int], None]) -> None:
    """Call `act(n)` before this process's n-th file operation from now on. In a forked child: the hook stays."""
    count = [0]

    def hook(event: str, arguments: Any) -> None:
        if event in OPERATIONS:
            count[0] += 1
            act(count[0] - 1)

    for module, name in ((os, "fsync"), (safetensors.torch, "save_file")):  # not reported by Python
        _announce(module, name)
    sys.addaudithook(hook)


def _announce(module: Any, name: str) -> None:
    real, event = getattr(module, name), f"{module.__name__.split('.')[0]}.{name}"

    def announced(*args: Any, **options: Any) -> Any:
        sys.audit(event, *args)
        return real(*args, **options)

    setattr(module, name, announced)


def saving(folder: Path, way: str, step: int = 2) -> None:
    """One save, keeping one checkpoint."""
    step = 1 if way == "again" else step
    parts = [write_part(folder, "rank1", content(step, SMALL)[0]["model"])] if way == "parts" else []
    save(folder, step, *content(step, SMALL), keep=1, parts=parts)


def deaths(folder: Path, way: str) -> Counter[str]:
    """Die before the first file operation of a save, then before the second, and so on until a save succeeds. Counts:

    broken: no intact checkpoint. offered: broken files or folders named like one. left: files that the next save left.
    """
    found: Counter[str] = Counter(operations=0, broken=0, offered=0, left=0)
    code = 9
    while code == 9:
        home, n = folder / str(found["operations"]), found["operations"]
        save(home, 1, *content(1, SMALL), keep=1)

        def dying() -> None:
            before_operations(lambda k: os._exit(9) if k == n else None)  # noqa: B023
            saving(home, way)  # noqa: B023

        code = ended(in_child(dying))
        if code not in (0, 9):
            raise RuntimeError(f"a process that was to die before operation {n} of a save ended with {code}")
        _inspect(home, found)
        found["operations"] += code == 9
    return found


def errors(folder: Path, way: str, code: int, lasting: bool, every: int = 1) -> Counter[str]:
    """Make each file operation of a save fail in turn, with or without all that follow, and then save once more.

    wrong: a save that neither succeeded nor raised CheckpointError, or whose result was not what it reported.
    `every`: try only each operation number that is a multiple of this.
    """
    found: Counter[str] = Counter(operations=0, reported=0, wrong=0, broken=0, offered=0, left=0)
    ended_with = -1
    while ended_with != _UNTOUCHED:
        n = every * found["operations"]
        home = folder / str(n)
        save(home, 1, *content(1, SMALL), keep=1)
        ended_with = ended(in_child(lambda: _failing(home, way, n, code, lasting)))  # noqa: B023
        found["reported"] += ended_with == _REPORTED
        found["wrong"] += ended_with not in (_UNTOUCHED, _REPORTED, _SAVED)
        if ended_with == _SAVED and way != "again":
            latest = latest_good(home)
            found["wrong"] += latest is None or latest.step != 2
        _inspect(home, found)
        found["operations"] += ended_with != _UNTOUCHED
    return found


def _failing(home: Path, way: str, n: int, code: int, lasting: bool) -> int:
    broken = [True, False]  # whether operations fail, whether one did

    def fail(k: int) -> None:
        if broken[0] and (k == n or lasting and k > n):
            broken[1] = True
            raise OSError(code, os.strerror(code))

    before_operations(fail)
    try:
        saving(home, way)
    except CheckpointError:
        return _REPORTED
    finally:
        broken[0] = False
    return _SAVED if broken[1] else _UNTOUCHED


def _inspect(home: Path, found: Counter[str]) -> None:
    """Count what a fault left; there must be an intact checkpoint, and the next save must remove everything else."""
    latest = latest_good(home)
    found["broken"] += latest is None or not is_content(latest, SMALL)
    found["offered"] += sum(not is_intact(path) for path in home.glob("step-*"))
    save(home, 3, *content(3, SMALL), keep=1)
    found["left"] += os.listdir(home) != ["step-00000003"]
    shutil.rmtree(home)
