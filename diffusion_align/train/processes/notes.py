"""What the processes of a job are doing, a note each, and who of them is at fault when one is left alone.

A note is a file of one line in .ranks of the run folder, written over in place. Its process holds a lock on it for as
long as it lives, so a note that nobody holds is of a process that is gone, however it ended.
"""

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LENGTH = 2048  # bytes of a note, whatever it says


@dataclass
class Note:
    """What a process does, since `time`. `waiting`: it has come to where all meet. `error`: what ended it; one that
    ended for want of another is `lost`. `locked`: the file system has locks. `gone`: nobody holds the note."""

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
    def guilty(self) -> bool:
        """Whether it says by itself that its process has ended, and not for want of another."""
        return not self.lost and (self.gone or bool(self.error))


def note_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"


def whence(note: Note) -> str:
    return f"rank {note.rank} at step {note.step} ({note.doing})"


def read_notes(folder: Path, ranks: Sequence[int]) -> list[Note]:
    """The notes of these ranks; one that is missing is of a process that ended well."""
    return [note for rank in ranks if (note := _read(note_path(folder, rank), rank)) is not None]


def blame(others: Sequence[Note], now: float) -> str:
    """Who of the others is at fault: those that failed, else those that are gone, else the one behind; and since when.

    Times are those of the processes' own machines.
    """
    failed = [note for note in others if note.error and not note.lost]
    gone = [note for note in others if note.gone and not note.error]
    alive = [note for note in others if not note.error]
    # Where all wait, one stands still within the meeting itself, or the connection does: most likely the first there.
    behind = [note for note in alive if not note.waiting] or alive
    if failed:
        return "; ".join(f"{whence(note)} failed: {note.error}" for note in failed)
    if gone:
        return "; ".join(f"{whence(note)} is gone, killed perhaps, last heard of {_ago(note, now)}" for note in gone)
    if behind:
        late = min(behind, key=lambda note: note.time)
        what = f"{late.doing}, waiting as all do" if late.waiting else late.doing
        return (
            f"rank {late.rank} has not moved since step {late.step} ({what}), {_ago(late, now)}; "
            "if it is only slow, raise --process_timeout"
        )
    return "no other process is known to be at fault; see what they print, and the connection between them"


def _read(path: Path, rank: int) -> Note | None:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        note = Note(**json.loads(os.pread(file, LENGTH, 0)))
        if note.locked:
            note.gone = _unheld(file)
    finally:
        os.close(file)
    return note


def _unheld(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ago(note: Note, now: float) -> str:
    return f"{max(0.0, now - note.time):.0f} s ago"
