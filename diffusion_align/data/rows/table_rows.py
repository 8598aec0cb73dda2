"""Rows of tables, one at a time: parquet, JSON lines, a JSON list, CSV, lines of text, captions beside pictures.

Memory does not grow with the table.
"""

import csv
import json
import re
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.rows.known_layouts import Layout
from diffusion_align.data.rows.raw_rows import RawRow, open_parquet, parquet_damage
from diffusion_align.system.printable import printable

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv")
# A longer line is not a row of a table, and would be kept in memory whole.
MAX_ROW = 16 << 20
_MAX_CAPTION = 1024 * 1024
_ROWS_FOR_COLUMNS = 100
_CHARACTERS_AT_A_TIME = 1 << 20
_decode = json.JSONDecoder().raw_decode
_SPACE = re.compile(r"[ \t\r\n]*")


def columns_of(file: Path) -> list[str]:
    """The columns of a table; where each row names its own, those of the first 100 rows. A bare text is a prompt.

    They are names to compare and to print: characters that a terminal would act on are escaped.
    """
    if file.suffix == ".parquet":
        return list(map(printable, parquet_schema(file).names))
    rows = islice((row for _, row in _rows(file)), _ROWS_FOR_COLUMNS)
    return list(dict.fromkeys(printable(str(name)) for row in rows if isinstance(row, dict) for name in row))


def table_rows(file: Path, layout: Layout, under: tuple[str, ...] = ("",)) -> Iterator[BadRow | RawRow]:
    """The rows of a table whose layout is known. Files that it names lie beside it, in one of the folders `under`.

    Raises:
        DataError: the file is damaged, so that it is not known where its rows end.
    """
    if file.suffix == ".parquet":
        yield from _parquet_raw_rows(file, layout, under)
        return
    for number, row in _rows(file):
        where = f"{file.name}:{number}"
        if isinstance(row, ValueError):
            yield BadRow(where, str(row))
        elif not isinstance(row, dict):
            yield BadRow(where, f"is a {type(row).__name__}, not an object with names")
        else:
            yield RawRow(where, row, file, number, root=file.parent, under=under)


def prompt_lines(file: Path) -> Iterator[BadRow | RawRow]:
    """Each line that is not blank, counted from 1, as a prompt."""
    for number, line in _lines(file):
        where = f"{file.name}:{number}"
        try:
            yield RawRow(where, {"prompt": line.decode("utf-8-sig").strip()}, file, number)
        except UnicodeDecodeError:
            yield BadRow(where, "is not text in UTF-8")


def captioned_picture(folder: Path, number: int, path: Path) -> BadRow | RawRow:
    """A picture with the text beside it (kohya's layout)."""
    name = path.relative_to(folder).as_posix()
    beside = path.with_suffix(".txt")
    try:
        if not beside.is_file():
            return BadRow(name, f"has no {beside.name} beside it")
        if not beside.resolve().is_relative_to(folder.resolve()):
            return BadRow(name, f"{beside.name} leads outside")
        if beside.stat().st_size > _MAX_CAPTION:
            return BadRow(name, f"{beside.name} holds over {_MAX_CAPTION:,} bytes")
        text = beside.read_text(encoding="utf-8").strip()
        return RawRow(name, {"file_name": name, "prompt": text}, folder, number, root=folder)
    except (UnicodeDecodeError, OSError, RuntimeError) as error:
        return BadRow(name, f"{beside.name} cannot be read ({error})")


def parquet_rows(file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some (small) columns of a parquet file as rows, one row group in memory at a time.

    A cell that cannot be a Python value, such as text that is not UTF-8, becomes the error that says so.

    Raises:
        DataError: the file or one of its row groups is damaged.
    """
    with parquet_damage(f"{file}: cannot be read as parquet"):
        table = open_parquet(file)
    with table:
        for group in range(table.num_row_groups):
            with parquet_damage(f"{file}: row group {group} is damaged"):
                read = table.read_row_group(group, columns=columns)
                values = [_values(read.column(name)) for name in columns]
            for row in range(read.num_rows):
                yield {name: column[row] for name, column in zip(columns, values, strict=True)}


def parquet_schema(file: Path) -> pa.Schema:
    """The columns of a parquet file and their types."""
    with parquet_damage(f"{file}: cannot be read as parquet"):
        schema = pq.read_schema(file)
        schema.names  # noqa: B018  (decodes them: a damaged one shows here)
        return schema


def _parquet_raw_rows(file: Path, layout: Layout, under: tuple[str, ...]) -> Iterator[RawRow]:
    schema = parquet_schema(file)
    named = layout.reads(schema.names)
    cells = frozenset(name for name in named if _holds_bytes(schema.field(name).type))
    small = [name for name in named if name not in cells]
    for row, values in enumerate(parquet_rows(file, small)):
        yield RawRow(f"{file.name}:{row}", values, file, row, cells, file.parent, under)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds pictures themselves: bytes, {bytes, path}, or a list of either."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


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


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each row; a damaged row is its error, a bare text is a prompt."""
    found = {".json": _json_items, ".csv": _csv_rows}.get(file.suffix, json_lines)(file)
    for number, row in found:
        yield number, {"prompt": row} if isinstance(row, str) else row


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and value of every line that is not blank; a line that is not JSON gives its error."""
    for number, line in _lines(file):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"is not JSON ({' '.join(str(error).split())[:200]})")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of every line that is not blank; DataError for one over MAX_ROW."""
    with file.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_ROW + 1), b""), start=1):
            if len(line) > MAX_ROW:
                raise DataError(f"{file}: line {number} is over {MAX_ROW:,} bytes; is this a file of lines?")
            if line.strip():
                yield number, line


def _json_items(file: Path) -> Iterator[tuple[int, Any]]:
    """The items of a file that holds one JSON list, counted from 0, with a part of the file in memory at a time."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            text, place = stream.read(_CHARACTERS_AT_A_TIME), 0
            place = _past_space(text, 0)
            if text[place : place + 1] != "[":
                raise DataError(f"{file}: is not a JSON list of rows; it begins with {text[place : place + 20]!r}")
            place = _past_space(text, place + 1)
            if text[place : place + 1] == "]":
                return
            while True:
                while (found := _item(text, place)) is None:
                    more = stream.read(_CHARACTERS_AT_A_TIME)
                    text, place = text[place:] + more, 0
                    if not more or len(text) > MAX_ROW:
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
    """The item of a JSON list at a place, the comma or bracket behind it, and the place after that; None if the text
    ends too early.

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
    """The rows of a CSV with a line of names, counted from 1; bytes that are not UTF-8 become surrogates, which no
    prompt may hold."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        rows = csv.DictReader(stream)
        for number in count(1):
            try:
                yield number, next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, ValueError(f"is not CSV ({error})")
