"""Pictures in cells of parquet and arrow files, which stay there until they are read."""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.data.bad_rows import DataError

# What pyarrow raises for bytes that are no longer a table: a flipped bit may lie in a name, a type or a length.
_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """A picture in a cell of a parquet file."""

    file: Path
    row: int
    column: str

    def read(self) -> bytes:
        """The bytes of the cell, also from a {bytes, path} struct; DataError if there are none."""
        data = _picture_bytes(_parquet_value(str(self.file), self.row, self.column))
        if data is None:
            raise DataError(f"{self.file.name} row {self.row}: {self.column} holds no picture bytes")
        return data


@dataclass(frozen=True, slots=True)
class ParquetItem:
    """One of the `of` pictures that a cell of a parquet file lists."""

    file: Path
    row: int
    column: str
    item: int
    of: int

    def read(self) -> bytes:
        """The picture's bytes, also from a {bytes, path} struct; DataError if there are none, or not `of` pictures."""
        values = _parquet_value(str(self.file), self.row, self.column)
        where = f"{self.file.name} row {self.row}: {self.column}"
        if not isinstance(values, list) or len(values) != self.of:
            found = len(values) if isinstance(values, list) else type(values).__name__
            raise DataError(f"{where} holds {found}, not the {self.of} pictures that the row ranks")
        data = _picture_bytes(values[self.item])
        if data is None:
            raise DataError(f"{where} holds no picture bytes at place {self.item}")
        return data


def open_parquet(file: str | Path) -> pq.ParquetFile:
    """A parquet file whose pages are checked, if whoever wrote it gave them checksums."""
    return pq.ParquetFile(file, page_checksum_verification=True)


@contextmanager
def parquet_damage(what: str) -> Iterator[None]:
    """Raise DataError, beginning with `what`, for anything that pyarrow raises for damaged bytes."""
    try:
        yield
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"{what} ({' '.join(str(error).split())[:200]}); fetch the file again") from error


def is_arrow(file: Path) -> bool:
    """Whether a file is an arrow table, by its name."""
    return file.suffix.lower() == ".arrow"


def open_arrow(file: Path) -> pa.Table:
    """An arrow file, of either format, mapped into memory; its offsets are checked, so no cell reads beyond it."""
    source = pa.memory_map(str(file))
    try:
        table = pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        table = pa.ipc.open_file(source).read_all()
    for batch in table.to_batches():
        batch.validate()
    return table


def _picture_bytes(value: Any) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def _parquet_value(file: str, row: int, column: str) -> Any:
    # The time of the last change is part of the keys, so that a file rewritten meanwhile is read again.
    changed = Path(file).stat().st_mtime_ns
    if is_arrow(Path(file)):
        with parquet_damage(f"{Path(file).name}: row {row} is damaged"):
            return _arrow_column(file, changed, column)[row].as_py()
    first_rows = _first_rows(file, changed)
    if not 0 <= row < first_rows[-1]:
        raise DataError(f"{Path(file).name}: there is no row {row}")
    group = bisect_right(first_rows, row) - 1
    with parquet_damage(f"{Path(file).name}: row group {group} is damaged"):
        return _column_chunk(file, changed, group, column)[row - first_rows[group]].as_py()


@lru_cache(maxsize=4096)
def _first_rows(file: str, changed: int) -> list[int]:
    with parquet_damage(f"{file}: cannot be read as parquet"):
        metadata = pq.read_metadata(file)
    return list(accumulate((metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)), initial=0))


# Pairs are read in file order, so two columns of the current row group are enough to keep.
@lru_cache(maxsize=2)
def _column_chunk(file: str, changed: int, group: int, column: str) -> pa.ChunkedArray:
    with open_parquet(file) as table:
        return table.read_row_group(group, columns=[column]).column(column)


@lru_cache(maxsize=4)
def _arrow_column(file: str, changed: int, column: str) -> pa.ChunkedArray:
    found = open_arrow(Path(file)).column(column)
    found.validate(full=True)
    return found
