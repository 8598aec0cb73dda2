"""Rows of tables, one at a time: parquet, arrow, JSON, CSV, lines of text, captions beside pictures.

Memory does not grow with the table.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.rows.find_picture import inside
from diffusion_align.data.rows.known_layouts import PROMPT_LIST, Layout
from diffusion_align.data.rows.raw_rows import PROMPT_COLUMNS, RawRow
from diffusion_align.data.rows.tables.columnar import COLUMNAR, columnar_rows, parquet_schema
from diffusion_align.data.rows.tables.columns import renamed, renaming
from diffusion_align.data.rows.tables.csv_rows import csv_rows
from diffusion_align.data.rows.tables.json_rows import json_rows, text_lines
from diffusion_align.data.rows.tables.text import PLAIN, ReadOptions, TextFile, decoded, is_packed, kind_of, not_text
from diffusion_align.system.printable import printable

JSON = (".jsonl", ".ndjson", ".json")
CSV = (".csv", ".tsv")
SUFFIXES = (*COLUMNAR, *JSON, *CSV)
CAPTION_SUFFIXES = (".txt", ".caption")
_MAX_CAPTION = 1024 * 1024
_ROWS_FOR_COLUMNS = 100


def is_table(file: TextFile) -> bool:
    """Whether a file is a table, by its name. Parquet and arrow are not read compressed."""
    kind = kind_of(file)
    return kind in SUFFIXES and not (kind in COLUMNAR and is_packed(file))


def columns_of(file: TextFile, encoding: str = "") -> list[str]:
    """The columns of a table; where each row names its own, those of the first 100 rows. A bare text is a prompt.

    They are names to compare and to print: characters that a terminal would act on are escaped.

    Raises:
        DataError: none of these rows can be read; with the reason of the first.
    """
    if isinstance(file, Path) and kind_of(file) in COLUMNAR:
        return list(map(printable, parquet_schema(file).names))
    rows = list(islice(_rows(file, encoding), _ROWS_FOR_COLUMNS))
    names = list(dict.fromkeys(printable(str(name)) for _, row in rows if isinstance(row, dict) for name in row))
    if not names and rows and isinstance(rows[0][1], ValueError):
        raise DataError(f"{file}: row {rows[0][0]} {rows[0][1]}")
    return names


def our_columns(file: TextFile, options: ReadOptions = PLAIN) -> dict[str, str]:
    """The columns of a table by our names -> theirs, renamed as `renaming` has it."""
    columns = columns_of(file, options.encoding)
    return renamed(columns, renaming(file, columns, options.columns))


def table_rows(
    file: TextFile, layout: Layout, under: tuple[str, ...] = ("",), options: ReadOptions = PLAIN
) -> Iterator[BadRow | RawRow]:
    """The rows of a table whose layout is known. Files that it names lie beside it, in one of the folders `under`.

    Raises:
        DataError: the file is damaged, so that it is not known where its rows end.
    """
    names = renaming(file, columns_of(file, options.encoding), options.columns)
    if layout is PROMPT_LIST:  # what else it has stays as it is
        names = {theirs: ours for theirs, ours in names.items() if ours in PROMPT_COLUMNS}
    if isinstance(file, Path) and kind_of(file) in COLUMNAR:
        yield from columnar_rows(file, layout, names, under)
        return
    for number, row in _rows(file, options.encoding):
        where = f"{file.name}:{number}"
        if isinstance(row, ValueError):
            yield BadRow(where, str(row))
        elif not isinstance(row, dict):
            yield BadRow(where, f"is a {type(row).__name__}, not an object with names")
        else:
            yield RawRow(where, _by_our_names(row, names), file, number, root=file.parent, under=under)


def _by_our_names(row: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: row[theirs] for ours, theirs in renamed(row, names).items()} if names else row


def prompt_lines(file: TextFile, encoding: str = "") -> Iterator[BadRow | RawRow]:
    """Each line that is not blank, counted from 1, as a prompt."""
    for number, line in text_lines(file, encoding):
        where = f"{file.name}:{number}"
        try:
            yield RawRow(where, {"prompt": line.decode().strip()}, file, number)
        except UnicodeDecodeError as error:
            yield BadRow(where, not_text(error, line))


def text_beside(picture: Path) -> Path | None:
    """The text of a picture: x.txt or x.caption beside x.png, in any case of letters."""
    for suffix in CAPTION_SUFFIXES:
        for form in (suffix, suffix.upper(), suffix[:2].upper() + suffix[2:]):
            found = picture.with_suffix(form)
            if found.is_file():
                return found
    return None


def text_of(folder: Path, beside: Path, encoding: str) -> str:
    """The text of a small file under a folder; ValueError or OSError if it cannot be read."""
    try:
        inside(folder, beside.relative_to(folder).as_posix())
    except DataError as error:
        raise ValueError("leads outside") from error
    if beside.stat().st_size > _MAX_CAPTION:
        raise ValueError(f"holds over {_MAX_CAPTION:,} bytes")
    return decoded(beside.read_bytes(), encoding).strip()


def captioned_picture(folder: Path, number: int, path: Path, encoding: str = "") -> BadRow | RawRow:
    """A picture with the text beside it (kohya's layout)."""
    name = path.relative_to(folder).as_posix()
    beside = text_beside(path)
    if beside is None:
        return BadRow(name, f"has no {path.with_suffix('.txt').name} beside it")
    try:
        text = text_of(folder, beside, encoding)
    except ValueError as error:
        return BadRow(name, f"{beside.name} {error}")
    except (OSError, RuntimeError) as error:
        return BadRow(name, f"{beside.name} cannot be read ({error})")
    return RawRow(name, {"file_name": name, "prompt": text}, folder, number, root=folder)


def _rows(file: TextFile, encoding: str = "") -> Iterator[tuple[int, Any]]:
    """Number and value of each row; a damaged row is its error, a bare text is a prompt."""
    for number, row in (csv_rows if kind_of(file) in CSV else json_rows)(file, encoding):
        yield number, {"prompt": row} if isinstance(row, str) else row
