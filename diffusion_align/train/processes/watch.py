"""Each process of a job records what it is doing, and its error messages name the rank that caused a failure.

With one process nothing is written. A record is one small write into a file that the system caches in memory; no
process waits for another here.
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

from diffusion_align.train.processes.notes import LENGTH, Note, describe_fault, describe_place, note_path, read_notes

# In the messages of RuntimeErrors of communication, as gloo raises no class of its own.
_LOST = ("gloo", "Application timeout caused pair closure", "NCCL")
_SETTLING = 2.0  # seconds: the connections of a process that fails may close before it has written its note
_ERROR_LENGTH = 300  # letters of an error in a note
logger = logging.getLogger(__name__)


class ProcessLost(RuntimeError):
    """This process lost another one; the message says which, and what that one was doing."""


class ProcessFailed(RuntimeError):
    """This process, one of several, failed; the message begins with its rank. `unexpected`: the cause may be a bug."""

    unexpected = False


@dataclass
class _Watch:
    folder: Path
    processes: int
    file: int
    note: Note


_watch: _Watch | None = None


def start(folder: Path, rank: int, processes: int) -> None:
    """Begin the note of this process. Call it on all ranks, then a barrier: it also removes the notes of an old job."""
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
        note.locked = False  # a network disk without locks: an ended process then looks like a stalled one
    _watch = _Watch(folder, processes, file, note)
    _write(_watch)


def stop() -> None:
    """Remove the note of this process, which has finished."""
    global _watch
    if _watch is None:
        return
    ended, _watch = _watch, None
    note_path(ended.folder, ended.note.rank).unlink(missing_ok=True)
    os.close(ended.file)


def record_activity(what: str, step: int | None = None) -> None:
    """Record what this process begins to do, and in which step (None: in the step recorded last)."""
    if _watch is not None:
        note = _watch.note
        note.doing, note.step, note.waiting = what, note.step if step is None else step, False
        _write(_watch)


@contextmanager
def in_collective() -> Iterator[None]:
    """Record that this process is in a collective operation: then the others are not waiting for it."""
    if _watch is None:
        yield
        return
    _watch.note.waiting = True
    _write(_watch)
    yield
    _watch.note.waiting = False
    _write(_watch)


@contextmanager
def names_failed_rank(*on_all_ranks: type[BaseException]) -> Iterator[None]:
    """Errors raised within name the rank that caused them. Errors of the classes `on_all_ranks` stay as they are.

    Raises:
        ProcessFailed: in place of an error of this process.
        ProcessLost: in place of an error of communication.
    """
    try:
        yield
    except (*on_all_ranks, ProcessFailed, ProcessLost):
        raise
    except Exception as error:
        if _watch is None:
            raise
        if _is_loss(error):
            fault = describe_fault(_others(_watch, patient="imed out" not in str(error)), time.time())
            _end(_watch, fault, lost=True)
            raise ProcessLost(f"{describe_place(_watch.note)} was left waiting: {fault}") from error
        text, unexpected = _text(error)
        _end(_watch, text)
        failed = ProcessFailed(f"{describe_place(_watch.note)}: {text}")
        failed.unexpected = unexpected
        raise failed from error
    except BaseException as error:  # a second signal stops one process at once
        if _watch is not None:
            _end(_watch, str(error) or type(error).__name__)
        raise


def _others(watch: _Watch, patient: bool) -> list[Note]:
    """The notes of the other ranks. If `patient`, wait up to two seconds for one whose process has ended."""
    end = time.monotonic() + (_SETTLING if patient else 0)
    while True:
        notes = read_notes(watch.folder, [rank for rank in range(watch.processes) if rank != watch.note.rank])
        if any(note.at_fault for note in notes) or time.monotonic() >= end:
            return notes
        time.sleep(0.05)


def _is_loss(error: Exception) -> bool:
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)
    )


def _text(error: Exception) -> tuple[str, bool]:
    """The error in one line, and whether it is unexpected: then the line begins with its class."""
    text = " ".join(str(error).split())
    ours = type(error).__module__.startswith("diffusion_align.")
    if isinstance(error, torch.OutOfMemoryError) or (text and (ours or isinstance(error, ValueError | OSError))):
        return text, False
    return f"{type(error).__name__}: {text}", True


def _end(watch: _Watch, error: str, *, lost: bool = False) -> None:
    watch.note.error, watch.note.lost = error[:_ERROR_LENGTH], lost
    _write(watch)


def _write(watch: _Watch) -> None:
    watch.note.time = time.time()
    line = json.dumps(asdict(watch.note), ensure_ascii=False).encode("utf-8", "replace")
    try:
        os.pwrite(watch.file, line.ljust(LENGTH), 0)
    except OSError as error:  # the run continues without a current note
        logger.warning("rank %d: its note in %s could not be written (%s)", watch.note.rank, watch.folder, error)
