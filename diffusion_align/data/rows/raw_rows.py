"""A row as its file has it: small values by name, and its pictures, which stay in their files until they are read."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.data.bad_rows import DataError

PROMPT_COLUMNS = ("prompt", "caption", "text", "original_prompt")
# What pyarrow raises for bytes that are no longer parquet: a flipped bit may lie in a name, a type or a length.
_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, RecursionError)


class RowError(ValueError):
    """A row that cannot be used; the message is the reason, without the row's id."""


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


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside a tar archive."""

    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes; DataError if the archive has become shorter."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
        if len(data) != self.size:
            raise DataError(f"{self.file.name}: is cut off at byte {self.offset + len(data):,}; fetch the file again")
        return data


StoredPicture = bytes | Path | ParquetCell | ParquetItem | TarMember


def read_bytes(picture: StoredPicture) -> bytes:
    """A picture's bytes, wherever they are; DataError or OSError if they cannot be read."""
    if isinstance(picture, bytes):
        return picture
    return picture.read_bytes() if isinstance(picture, Path) else picture.read()


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row of a table, or a sample of an archive, before its layout is applied.

    Attributes:
        cells: names of columns whose pictures stay in the parquet file; others name files, or hold archive members.
        root: the folder that every file lies in; `under` are folders of it in which to look, in this order.
    """

    id: str
    values: Mapping[str, Any]
    file: Path
    row: int
    cells: frozenset[str] = frozenset()
    root: Path = Path()
    under: tuple[str, ...] = ("",)

    def prompt(self) -> str:
        """The prompt; RowError if there is none."""
        prompt = next((self.values[name] for name in PROMPT_COLUMNS if name in self.values), None)
        fault = prompt_fault(prompt)
        if fault is not None or not isinstance(prompt, str):
            raise RowError(str(fault))
        return prompt

    def picture(self, column: str) -> StoredPicture:
        """The picture of a column; RowError if there is none."""
        if column in self.cells:
            return ParquetCell(self.file, self.row, column)
        return self._find(self.values.get(column), column)

    def pictures(self, column: str, count: int) -> list[StoredPicture]:
        """The `count` pictures that a parquet column lists, or all that another lists; RowError if it is no list."""
        if column in self.cells:
            return [ParquetItem(self.file, self.row, column, item, count) for item in range(count)]
        names = self.values.get(column)
        if not isinstance(names, list):
            keys = ", ".join(map(repr, list(self.values)[:8]))
            raise RowError(f"is no ranking: a list {column!r} is missing; it has {keys}")
        return [self._find(name, f"{column}[{place}]") for place, name in enumerate(names)]

    def _find(self, name: Any, what: str) -> StoredPicture:
        if isinstance(name, TarMember):
            return name
        found = [find_picture(self.root, f"{folder}/{name}" if folder else name, what) for folder in self.under]
        path = next((path for path in found if isinstance(path, Path)), None)
        if path is None:
            raise RowError(str(found[0]))
        return path


def prompt_fault(prompt: Any) -> str | None:
    """Why this cannot be a prompt; None if it can."""
    if not isinstance(prompt, str):
        return f"the prompt is {type(prompt).__name__}, not text"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "the prompt holds a lone surrogate, which is no text in UTF-8"
    return None


def find_picture(root: Path, name: Any, what: str) -> Path | str:
    """The file that `what` names under a root, or why there is none. DataError for a path that leaves the root."""
    if not isinstance(name, str) or not name:
        return f"{what!r} is {type(name).__name__}, not a file name"
    try:
        path = inside(root, name)
        if path.is_file():
            return path
    except DataError:
        raise
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, a name too long, a loop of links
        return f"picture {name[:80]!r} cannot be looked up ({error})"
    return f"picture {name[:200]!r} does not exist in {root}"


def inside(root: Path, name: str) -> Path:
    """The path that `name` means under `root`, symbolic links resolved; DataError if it leaves the root."""
    path = (root / name).resolve()
    if not path.is_relative_to(_resolved(root)):
        raise DataError(f"{root}: path {name!r:.200} leads outside; put the pictures beside the file that lists them")
    return path


# Called for every picture of a list, always with the same few folders.
@lru_cache(maxsize=64)
def _resolved(root: Path) -> Path:
    return root.resolve()


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


def _picture_bytes(value: Any) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def _parquet_value(file: str, row: int, column: str) -> Any:
    # The time of the last change is part of the keys, so that a file rewritten meanwhile is read again.
    changed = Path(file).stat().st_mtime_ns
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
