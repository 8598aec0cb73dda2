"""A note for each process of a job says what it is doing; from the notes follows which rank is at fault.

A note is a file of one line in .ranks of the run folder, overwritten in place. Its process holds a lock on it as long
as it lives, so an unlocked note belongs to a process that has ended, for whatever reason.
"""

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LENGTH = 2048  # bytes of a note, padded with spaces


@dataclass
class Note:
    """What a process is doing, since `time`. `waiting`: it is in a collective operation. `error`: what ended it;
    `lost`: that was the loss of another process. `locked`: the file system has locks. `gone`: the note is unlocked."""

    rank: int
    step: int = 0
    doing: str = "loading"
    time: float = 0.0
    waiting: bool = False
    error: str = ""
    lost: bool = False
    locked: bool = True
    gone: bool = False

    @property
    def at_fault(self) -> bool:
        """Whether its process has ended, and not because it lost another one."""
        return not self.lost and (self.gone or bool(self.error))


def note_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"


def describe_place(note: Note) -> str:
    return f"rank {note.rank} at step {note.step} ({note.doing})"


def read_notes(folder: Path, ranks: Sequence[int]) -> list[Note]:
    """The notes of these ranks; a process that finishes removes its note."""
    return [note for rank in ranks if (note := _read(note_path(folder, rank), rank)) is not None]


def describe_fault(others: Sequence[Note], now: float) -> str:
    """Which of the others is at fault, and since when: those that failed, else those that are gone, else the slowest.

    Times are those of the clocks of their machines.
    """
    failed = [note for note in others if note.error and not note.lost]
    gone = [note for note in others if note.gone and not note.error]
    alive = [note for note in others if not note.error]
    # If all wait, one hangs inside the collective operation, most likely the first that entered it.
    behind = [note for note in alive if not note.waiting] or alive
    if failed:
        return "; ".join(f"{describe_place(note)} failed: {note.error}" for note in failed)
    if gone:
        return "; ".join(f"{describe_place(n)} is gone, perhaps killed; last note {_ago(n, now)}" for n in gone)
    if behind:
        late = min(behind, key=lambda note: note.time)
        what = f"{late.doing}, waiting as all do" if late.waiting else late.doing
        return f"rank {late.rank} has not moved since step {late.step} ({what}), {_ago(late, now)}"
    return "no other process is known to be at fault; check their output and the network"


def _read(path: Path, rank: int) -> Note | None:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        note = Note(**json.loads(os.pread(file, LENGTH, 0)))
        if note.locked:
            note.gone = _is_unlocked(file)
    finally:
        os.close(file)
    return note


def _is_unlocked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ago(note: Note, now: float) -> str:
    return f"{max(0.0, now - note.time):.0f} s ago"
