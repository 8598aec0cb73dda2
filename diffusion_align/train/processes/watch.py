"""Each process of a job notes what it does, and names the one at fault when it is left alone: no process waits here.

Where there is only one process nothing is written. A note costs one write of a page that the system keeps in memory.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed

from diffusion_align.train.processes.notes import LENGTH, Note, blame, note_path, read_notes, whence

# Of RuntimeErrors that come of talking to another process; gloo has no class of its own for them.
_LOST = ("gloo", "Application timeout caused pair closure", "NCCL")
_SETTLING = 2.0  # seconds: the connections of a process that ends may close a little before its note says so
_SAID = 300  # letters of an error that go into a note
logger = logging.getLogger(__name__)


class ProcessLost(RuntimeError):
    """This process could not go on for want of another; the message says which, and where that was."""


class ProcessFailed(RuntimeError):
    """This process, of several, has failed; the message begins with its rank."""


@dataclass
class _Watch:
    folder: Path
    processes: int
    file: int
    note: Note


_watch: _Watch | None = None


def start(folder: Path, rank: int, processes: int) -> None:
    """Begin this process's note. Call it on all, and let all meet before anything can fail: then old notes are gone."""
    global _watch
    stop()
    for old in folder.glob("rank-*"):
        if int(old.name.removeprefix("rank-")) % processes == rank:
            old.unlink(missing_ok=True)
    if processes == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file, note = os.open(note_path(folder, rank), os.O_RDWR | os.O_CREAT, 0o644), Note(rank)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        note.locked = False  # a network disk without locks: who is gone can then not be told from who stands still
    _watch = _Watch(folder, processes, file, note)
    _write(_watch)


def stop() -> None:
    """Remove this process's note: all went well."""
    global _watch
    if _watch is None:
        return
    ended, _watch = _watch, None
    note_path(ended.folder, ended.note.rank).unlink(missing_ok=True)
    os.close(ended.file)


def doing(what: str, step: int | None = None) -> None:
    """Note what this process begins, and in which step; without one, in the step named last."""
    if _watch is not None:
        note = _watch.note
        note.doing, note.step, note.waiting = what, note.step if step is None else step, False
        _write(_watch)


@contextmanager
def waiting() -> Iterator[None]:
    """Around every place where all processes meet: who is in there does not hold the others up."""
    if _watch is None:
        yield
        return
    _watch.note.waiting = True
    _write(_watch)
    yield
    _watch.note.waiting = False
    _write(_watch)


@contextmanager
def named(*alike: type[BaseException]) -> Iterator[None]:
    """Errors within name the process at whose door they lie. Those that come `alike` on all stay what they are.

    Raises:
        ProcessFailed: for an error of this process.
        ProcessLost: for one of talking to the others.
    """
    try:
        yield
    except (*alike, ProcessFailed, ProcessLost):
        raise
    except Exception as error:
        if _watch is None:
            raise
        if _is_loss(error):
            told = blame(_others(_watch, patient="imed out" not in str(error)), time.time())
            _end(_watch, told, lost=True)
            raise ProcessLost(f"{whence(_watch.note)} was left waiting: {told}") from error
        _end(_watch, _text(error))
        raise ProcessFailed(f"{whence(_watch.note)}: {_text(error)}") from error
    except BaseException as error:  # a second signal stops one process at once
        if _watch is not None:
            _end(_watch, str(error) or type(error).__name__)
        raise


def _others(watch: _Watch, patient: bool) -> list[Note]:
    """Their notes: at once, or `patient` until one tells why its process has ended."""
    end = time.monotonic() + (_SETTLING if patient else 0)
    while True:
        notes = read_notes(watch.folder, [rank for rank in range(watch.processes) if rank != watch.note.rank])
        if any(note.guilty for note in notes) or time.monotonic() >= end:
            return notes
        time.sleep(0.05)


def _is_loss(error: Exception) -> bool:
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)
    )


def _text(error: Exception) -> str:
    """One line; with the kind of an error that nobody meant."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return text
    meant = type(error).__module__.startswith("diffusion_align.") or isinstance(error, ValueError | OSError)
    return text if text and meant else f"{type(error).__name__}: {text} (--traceback shows where)"


def _end(watch: _Watch, error: str, *, lost: bool = False) -> None:
    watch.note.error, watch.note.lost = error[:_SAID], lost
    _write(watch)


def _write(watch: _Watch) -> None:
    watch.note.time = time.time()
    line = json.dumps(asdict(watch.note), ensure_ascii=False).encode("utf-8", "replace")
    try:
        os.pwrite(watch.file, line.ljust(LENGTH), 0)
    except OSError as error:  # no reason to lose a run
        logger.warning("rank %d: its note in %s stands still (%s)", watch.note.rank, watch.folder, error)
