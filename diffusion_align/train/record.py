"""metrics.jsonl: one JSON object per optimizer step, each with its `step`."""

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def append(path: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Append a complete row, or raise OSError (full disk) and leave the file as it was. nan and inf become null."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    line = (json.dumps(clean, allow_nan=False) + "\n").encode()
    # Unbuffered: a killed process leaves at most one torn line, the last.
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while line:  # a nearly full disk writes fewer bytes; only the next attempt raises the reason
                line = line[file.write(line) :]
        except OSError:
            file.truncate(end)  # a torn line would spoil the next one
            raise


def recorder(path: str | os.PathLike[str]) -> Callable[[dict[str, Any]], None]:
    """`append` for a loop that must survive a full disk: rows that cannot be written are dropped.

    It warns at the first dropped row, and with their number once writing works again.
    """
    lost: list[int] = []

    def add(row: dict[str, Any]) -> None:
        try:
            append(path, row)
        except OSError as error:
            if not lost:
                logger.warning(
                    "%s: step %s could not be written (%s); the training continues", path, row["step"], error
                )
            lost[:] = [row["step"], 1 + (lost[1] if lost else 0)]
            return
        if lost:
            logger.warning("%s: it can be written again; %d rows up to step %d are missing", path, lost[1], lost[0])
            lost.clear()

    return add


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All complete rows; a torn last line is ignored. Raises ValueError, naming the line, for any other bad line."""
    return [row for row, _ in _rows(Path(path))]


def truncate(path: str | os.PathLike[str], step: int) -> None:
    """Drop the rows after `step` and a torn last line, so that a resumed run continues the file."""
    path = Path(path)
    if not path.exists():
        return
    keep = 0
    for row, end in _rows(path):
        if row["step"] > step:
            break
        keep = end
    with path.open("r+b") as file:
        file.truncate(keep)
        os.fsync(file.fileno())


def _rows(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Each row with the byte at which its line ends."""
    rows: list[tuple[dict[str, Any], int]] = []
    end = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        end += len(line)
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a row with a step") from error
        rows.append((row, end))
    return rows
