"""What readers of preference data share: errors that name their cure, paths that stay inside, parquet cells."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.system.printable import printable

_EDGE = 64 * 1024
# What pyarrow raises for bytes that are no parquet, or no more: a flipped bit may lie in a name, a type or a length.
_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, RecursionError)
# One line of a table; more is no row, and would be kept in memory whole.
MAX_ROW = 16 << 20


class DataError(ValueError):
    """Data that cannot be used. One line: the file, the row or key, and the cure."""

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out: its id (file:row) and the reason."""

    row: str
    reason: str

    def __post_init__(self) -> None:
        # Names inside archives and tables are strangers' text, and these two are printed.
        for name in ("row", "reason"):
            object.__setattr__(self, name, printable(getattr(self, name)))


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
    try:
        return _column_chunk(file, changed, group, column)[row - first_rows[group]].as_py()
    except IndexError as error:  # the file's end promises more rows than the group has
        raise DataError(f"{Path(file).name}: row group {group} is damaged; fetch the file again") from error


@lru_cache(maxsize=4096)
def _first_rows(file: str, changed: int) -> list[int]:
    try:
        metadata = pq.read_metadata(file)
    except _DAMAGE as error:
        raise DataError(f"{file}: cannot be read as parquet ({_line(error)}); fetch the file again") from error
    return list(accumulate((metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)), initial=0))


# Pairs are read in file order, so two columns of the current row group are all that is worth keeping.
@lru_cache(maxsize=2)
def _column_chunk(file: str, changed: int, group: int, column: str) -> pa.ChunkedArray:
    try:
        with _opened(file) as table:
            return table.read_row_group(group, columns=[column]).column(column)
    except _DAMAGE as error:
        raise DataError(
            f"{Path(file).name}: row group {group} is damaged ({_line(error)}); fetch the file again"
        ) from error


def _opened(file: str | Path) -> pq.ParquetFile:
    """A parquet file whose pages are held against their checksums, where whoever wrote it gave them some."""
    return pq.ParquetFile(file, page_checksum_verification=True)


def iter_rows(file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some (small) columns of a parquet file as rows, one row group in memory at a time.

    A cell that cannot be a Python value, such as text that is no UTF-8, is the error that says so.

    Raises:
        DataError: the file or one of its row groups is damaged.
    """
    group = -1
    try:
        with _opened(file) as table:
            for group in range(table.num_row_groups):
                read = table.read_row_group(group, columns=columns)
                values = [_values(read.column(name)) for name in columns]
                for row in range(read.num_rows):
                    yield {name: column[row] for name, column in zip(columns, values, strict=True)}
    except _DAMAGE as error:
        where = "cannot be read as parquet" if group < 0 else f"row group {group} is damaged"
        raise DataError(f"{file}: {where} ({_line(error)}); fetch the file again") from error


def _values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_value(cell) for cell in column]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:
        return error


def column_names(file: Path) -> list[str]:
    """The columns of a parquet file."""
    return list(schema_of(file).names)


def schema_of(file: Path) -> pa.Schema:
    """The columns of a parquet file and their types."""
    try:
        schema = pq.read_schema(file)
        schema.names  # noqa: B018  (decodes them: a damaged one shows here)
        return schema
    except _DAMAGE as error:
        raise DataError(f"{file}: cannot be read as parquet ({_line(error)}); fetch the file again") from error


def jsonl_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and parsed value of every line that is not blank; a line that is no JSON gives its error."""
    for number, line in lines_of(file):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"is not JSON ({_line(error)})")


def lines_of(file: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of every line that is not blank; DataError for one without end, kept nowhere."""
    with file.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_ROW + 1), b""), start=1):
            if len(line) > MAX_ROW:
                raise DataError(f"{file}: line {number} is over {MAX_ROW:,} bytes; is this a file of lines?")
            if line.strip():
                yield number, line


def inside(root: Path, name: str) -> Path:
    """The path that `name` means under `root`, symbolic links resolved; DataError when it leaves the root."""
    path = (root / name).resolve()
    if not path.is_relative_to(_resolved(root)):
        raise DataError(f"{root}: path {name!r:.200} leads outside; put the pictures beside the file that lists them")
    return path


# Asked for every picture of a list, and always for the same few folders.
@lru_cache(maxsize=64)
def _resolved(root: Path) -> Path:
    return root.resolve()


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
