"""Deaths and errors before each file operation of a save; for `checkpoints.py`.

Python reports its own file operations to an audit hook, whichever of its functions asks for them. So there is no list
of functions here that a new way of writing could slip past.
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
from stress.checkpoint.kills import base, content, ended, in_child, is_content, whole

OPERATIONS = {
    "open", "os.chmod", "os.fsync", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir",
    "safetensors.save_file", "shutil.rmtree",
}  # fmt: skip
CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES)
SMALL = base(1000)
WAYS = ("next", "again", "parts")
"""A save after that of step 1: of the next step, of the same step again, of the next with a part of another process."""

_UNTOUCHED, _REPORTED, _SAVED = 0, 1, 2  # how a child says that its save ended


def before_operations(act: Callable[[int], None]) -> None:
    """Call `act(n)` before this process's n-th file operation from now on. In a forked child: the hook stays."""
    count = [0]

    def hook(event: str, arguments: Any) -> None:
        if event in OPERATIONS:
            count[0] += 1
            act(count[0] - 1)

    for module, name in ((os, "fsync"), (safetensors.torch, "save_file")):  # those which Python does not report
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
    """Die before every file operation of a save, until one comes through: what was found each time.

    broken: no whole checkpoint. offered: things named like one that are not whole. left: what the next save left lying.
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
            raise RuntimeError(f"the save before whose operation {n} a process was to die ended with {code}")
        _look(home, found)
        found["operations"] += code == 9
    return found


def errors(folder: Path, way: str, code: int, lasting: bool, every: int = 1) -> Counter[str]:
    """Fail every file operation of a save in turn, with or without all that follow, and then save once more.

    wrong: a save that ended otherwise than well or with CheckpointError, or said the one and did the other. `every`:
    how many operations lie between two that are tried.
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
        _look(home, found)
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


def _look(home: Path, found: Counter[str]) -> None:
    """What a fault left: a whole checkpoint of step 1 or 2, and nothing that the next save does not clear away."""
    latest = latest_good(home)
    found["broken"] += latest is None or not is_content(latest, SMALL)
    found["offered"] += sum(not whole(path) for path in home.glob("step-*"))
    save(home, 3, *content(3, SMALL), keep=1)
    found["left"] += os.listdir(home) != ["step-00000003"]
    shutil.rmtree(home)
