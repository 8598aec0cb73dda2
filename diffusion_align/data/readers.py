"""What readers of preference data share: errors that name their cure, paths that stay inside, parquet cells."""

import difflib
import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_EDGE = 64 * 1024


class DataError(ValueError):
    """Data that cannot be used. One line: the file, the row or key, and the cure."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out: its id (file:row) and the reason."""

    row: str
    reason: str


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """A picture that stays in its parquet file until it is asked for."""

    file: Path
    row: int
    column: str

    def read(self) -> bytes:
        """The bytes of the cell, also from a {bytes, path} struct; DataError when there are none."""
        value = _cell(str(self.file), self.row, self.column)
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise DataError(f"{self.file.name} row {self.row}: {self.column} holds no picture bytes")
        return value


def _cell(file: str, row: int, column: str) -> Any:
    # The time of the last change is part of the keys, so that a file rewritten meanwhile is not answered from memory.
    changed = Path(file).stat().st_mtime_ns
    first_rows = _first_rows(file, changed)
    if not 0 <= row < first_rows[-1]:
        raise DataError(f"{Path(file).name}: there is no row {row}")
    group = bisect_right(first_rows, row) - 1
    return _column_chunk(file, changed, group, column)[row - first_rows[group]].as_py()


@lru_cache(maxsize=4096)
def _first_rows(file: str, changed: int) -> list[int]:
    metadata = pq.read_metadata(file)
    return list(accumulate((metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)), initial=0))


# Pairs are read in file order, so two columns of the current row group are all that is worth keeping.
@lru_cache(maxsize=2)
def _column_chunk(file: str, changed: int, group: int, column: str) -> pa.ChunkedArray:
    try:
        return pq.ParquetFile(file).read_row_group(group, columns=[column]).column(column)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{Path(file).name}: row group {group} is damaged ({_line(error)}); fetch the file again"
        ) from error


def read_columns(file: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Some (small) columns of a parquet file as rows."""
    try:
        return pq.read_table(file, columns=columns).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet ({_line(error)}); fetch the file again") from error


def column_names(file: Path) -> list[str]:
    """The columns of a parquet file."""
    try:
        return list(pq.read_schema(file).names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet ({_line(error)}); fetch the file again") from error


def require_columns(file: Path, present: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise DataError for the first missing column, with those present and the nearest name."""
    present = list(present)
    for name in wanted:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1, cutoff=0.6)
            cure = f"; did you mean {near[0]!r}? rename it to {name!r}" if near else ""
            raise DataError(
                f"{file}: column {name!r} is missing; it has {', '.join(map(repr, present)) or 'none'}{cure}"
            )


def jsonl_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and parsed value of every line that is not blank; a line that is no JSON gives its error."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, ValueError(f"is not JSON ({_line(error)})")


def inside(root: Path, name: str) -> Path:
    """The path that `name` means under `root`, symbolic links resolved; DataError when it leaves the root."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise DataError(f"{root}: path {name!r} leads outside; put the pictures beside the file that lists them")
    return path


def digest(data: bytes) -> str:
    """The name of some bytes: 32 hex digits of their blake2b."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digest(file: Path) -> str:
    """A name for a file's content that is cheap for large files: its size and its first and last 64 KiB.

    It does not depend on the file's name, place or time, so a copied data set keeps its caches. An edit in the middle
    of a large file that leaves the size alone goes unseen.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(_EDGE)
        stream.seek(max(_EDGE, size - _EDGE))
        return digest(str(size).encode() + head + stream.read(_EDGE))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
