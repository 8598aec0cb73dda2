"""Rows of tables, one at a time: parquet, JSON lines, a JSON list, CSV. Memory does not grow with the table."""

import csv
import json
import re
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffusion_align.data import raw_rows
from diffusion_align.data.known_layouts import Format
from diffusion_align.data.match import wanted
from diffusion_align.data.raw_rows import BadRow, DataError
from diffusion_align.data.records import Record
from diffusion_align.system.printable import printable

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv")
_LOOK_AT = 100
_PIECE = 1 << 20
_decode = json.JSONDecoder().raw_decode
_SPACE = re.compile(r"[ \t\r\n]*")


def columns_of(file: Path) -> list[str]:
    """The columns of a table; where each row names its own, those of the first 100 rows. A bare text is a prompt.

    They are names to compare and to print: one that a terminal would act on is told by its escapes.
    """
    if file.suffix == ".parquet":
        return list(map(printable, raw_rows.column_names(file)))
    rows = islice((row for _, row in _rows(file)), _LOOK_AT)
    return list(dict.fromkeys(printable(str(name)) for row in rows if isinstance(row, dict) for name in row))


def records(file: Path, known: Format, under: tuple[str, ...] = ("",)) -> Iterator[BadRow | Record]:
    """The rows of a table whose layout is known; files that it names are looked for beside it, in the folders `under`.

    Raises:
        DataError: the file cannot be read on, as its rows do not tell where they end.
    """
    if file.suffix == ".parquet":
        yield from _parquet(file, known, under)
        return
    for number, row in _rows(file):
        where = f"{file.name}:{number}"
        if isinstance(row, ValueError):
            yield BadRow(where, str(row))
        elif not isinstance(row, dict):
            yield BadRow(where, f"is a {type(row).__name__}, not an object with names")
        else:
            yield Record(where, row, file, number, root=file.parent, under=under)


def _parquet(file: Path, known: Format, under: tuple[str, ...]) -> Iterator[Record]:
    schema = raw_rows.schema_of(file)
    named = wanted(known, schema.names)
    cells = frozenset(name for name in named if _holds_bytes(schema.field(name).type))
    small = [name for name in named if name not in cells]
    for row, values in enumerate(raw_rows.iter_rows(file, small)):
        yield Record(f"{file.name}:{row}", values, file, row, cells, file.parent, under)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds pictures themselves: bytes, {bytes, path}, or a list of either."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each row; a row that is damaged is its error, a bare text is a prompt."""
    found = {".json": _json_items, ".csv": _csv_rows}.get(file.suffix, raw_rows.jsonl_rows)(file)
    for number, row in found:
        yield number, {"prompt": row} if isinstance(row, str) else row


def _json_items(file: Path) -> Iterator[tuple[int, Any]]:
    """The items of a file that holds one JSON list, counted from 0, with a piece of the file in memory at a time."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            text, place = stream.read(_PIECE), 0
            place = _past_space(text, 0)
            if text[place : place + 1] != "[":
                raise DataError(f"{file}: is not a JSON list of rows; it begins with {text[place : place + 20]!r}")
            place = _past_space(text, place + 1)
            if text[place : place + 1] == "]":
                return
            while True:
                while (found := _item(text, place)) is None:
                    more = stream.read(_PIECE)
                    text, place = text[place:] + more, 0
                    if not more or len(text) > raw_rows.MAX_ROW:
                        raise DataError(
                            f"{file}: item {number} is no JSON, or does not end: {text[:60]!r}; fetch the file again"
                        )
                item, mark, place = found
                yield number, item
                number += 1
                if mark == "]":
                    return
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file}: item {number} cannot be read ({str(error)[:200]}); fetch the file again") from error


def _item(text: str, place: int) -> tuple[Any, str, int] | None:
    """The item of a JSON list at a place, the comma or bracket behind it, and the place after that; None if not whole.

    Without the mark it is not known that the item ends here: 1 may go on as 12.
    """
    try:
        item, end = _decode(text, _past_space(text, place))
    except ValueError:
        return None
    end = _past_space(text, end)
    return (item, text[end], end + 1) if text[end : end + 1] in (",", "]") else None


def _past_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _csv_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a CSV with a line of names, counted from 1; what is no UTF-8 becomes text that no prompt may hold."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        rows = csv.DictReader(stream)
        for number in count(1):
            try:
                yield number, next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, ValueError(f"is not CSV ({error})")
