"""metrics.jsonl: one JSON object per optimizer step, each with its `step`; and what several methods log alike."""

import json
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor


def quantiles(name: str, values: Tensor) -> dict[str, float]:
    """The 5th, 50th and 95th percentile of values [M], under the names that all methods log them by."""
    low, middle, high = values.quantile(values.new_tensor([0.05, 0.5, 0.95])).tolist()
    return {f"{name}_p05": low, f"{name}_p50": middle, f"{name}_p95": high}


def append(path: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Add one row. Numbers that are not finite become null, for JSON knows none."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    line = json.dumps(clean, allow_nan=False) + "\n"
    # One unbuffered write: a killed process leaves at most one torn line, the last.
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode())


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole rows; a torn last line is left out. Raises ValueError, naming the line, for any other bad one."""
    return [row for row, _ in _rows(Path(path))]


def truncate(path: str | os.PathLike[str], step: int) -> None:
    """Drop the rows after `step`, and a torn last line: a resumed run then continues the file as if never stopped."""
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
