"""Rows of JSON: one object a line, one list, or one object that holds the list. What a file holds is told by its
content, as its suffix often does not.
"""

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.rows.tables.text import TextFile, kind_of, not_text, open_utf8

# A longer line is not a row of a table, and would be kept in memory whole.
MAX_ROW = 16 << 20
_MAX_OBJECT = 256 << 20  # bytes of a file that is one object, which is read whole
_CHARACTERS_AT_A_TIME = 1 << 20
_LISTS = ("data", "rows", "items", "pairs", "rankings", "samples", "annotations", "train", "prompts")
_decode = json.JSONDecoder().raw_decode
_SPACE = re.compile(r"[ \t\r\n]*")


def json_rows(file: TextFile, encoding: str = "") -> Iterator[tuple[int, Any]]:
    """Number and value of each row; a damaged line is its error.

    Raises:
        DataError: damaged so that it is not known where its rows end; or one object without a list of rows.
    """
    start = _first_line(file, encoding)
    if start.startswith(b"["):
        yield from _json_items(file, encoding)
    elif start.startswith(b"{") and not _is_json(start) and kind_of(file) == ".json":
        yield from enumerate(_rows_in(file, encoding))
    elif kind_of(file) == ".json" and (rows := _rows_in_line(start)) is not None:
        yield from enumerate(rows)
    elif kind_of(file) == ".json" and not start.startswith(b"{"):
        raise DataError(f"{file}: is not a JSON list of rows; it begins with {start[:20].decode(errors='replace')!r}")
    else:
        yield from json_lines(file, encoding)


def json_lines(file: TextFile, encoding: str = "") -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and value of every line that is not blank; a line that is not JSON gives its error."""
    for number, line in text_lines(file, encoding):
        try:
            yield number, json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield number, ValueError(not_text(error, line))
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"is not JSON ({' '.join(str(error).split())[:200]})")


def text_lines(file: TextFile, encoding: str = "") -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes in UTF-8 of every line that is not blank; DataError for one over MAX_ROW."""
    with open_utf8(file, encoding) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_ROW + 1), b""), start=1):
            if len(line) > MAX_ROW:
                raise DataError(f"{file}: line {number} is over {MAX_ROW:,} bytes; is this a file of lines?")
            if line.strip():
                yield number, line


def _first_line(file: TextFile, encoding: str) -> bytes:
    """The first line that is not blank, or as much of it as a row may have."""
    with open_utf8(file, encoding) as stream:
        for line in iter(lambda: stream.readline(MAX_ROW + 1), b""):
            if line.strip():
                return line.strip()
    return b""


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _rows_in_line(line: bytes) -> list[Any] | None:
    """The rows of a file whose first line is an object that holds a list or a table of them; None for a row."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return _listed(found) if isinstance(found, dict) else None


def _rows_in(file: TextFile, encoding: str) -> list[Any]:
    """The rows of a file that is one object over several lines."""
    with open_utf8(file, encoding) as stream:
        data = stream.read(_MAX_OBJECT + 1)
    if len(data) > _MAX_OBJECT:
        raise DataError(f"{file}: is one object of over {_MAX_OBJECT:,} bytes; give a list, or an object a line")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"{file}: is neither a JSON list nor an object a line ({said}); fetch it again, or save it as a list"
        ) from error
    rows = _listed(found)
    return [found] if rows is None else rows


def _listed(found: dict[str, Any]) -> list[Any] | None:
    """The rows that an object holds: a list under a usual name, or a table by columns as pandas writes it."""
    for name in _LISTS:
        if isinstance(found.get(name), list) and all(isinstance(row, dict | str) for row in found[name]):
            return found[name]
    columns = list(found.values())
    if len(columns) > 1 and all(isinstance(column, dict) and column for column in columns):
        keys = list(columns[0])
        if all(list(column) == keys for column in columns) and keys[0].isdigit():
            return [{name: column[key] for name, column in found.items()} for key in keys]
    return None


def _json_items(file: TextFile, encoding: str) -> Iterator[tuple[int, Any]]:
    """The items of a file that holds one JSON list, counted from 0, with a part of the file in memory at a time."""
    number = 0
    try:
        with open_utf8(file, encoding) as raw, io.TextIOWrapper(raw, encoding="utf-8") as stream:
            text, place = stream.read(_CHARACTERS_AT_A_TIME), 0
            place = _past_space(text, 0)
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
                    rest = text[place:] + stream.read(_CHARACTERS_AT_A_TIME)
                    if rest.strip():
                        what = f"goes on after its list, with {rest.strip()[:20]!r}"
                        raise DataError(f"{file}: {what}: give one list, or an object a line")
                    return
    except UnicodeDecodeError as error:
        bad = error.object[max(0, error.start - 500) : error.start + 500]
        near = UnicodeDecodeError("utf-8", bad, min(error.start, 500), min(error.start, 500) + 1, error.reason)
        raise DataError(f"{file}: item {number} cannot be read: it {not_text(near, bad)}") from error
    except RecursionError as error:
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
