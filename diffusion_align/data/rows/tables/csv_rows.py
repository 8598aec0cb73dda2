"""Rows of CSV and its kin. The separator is the one that gives the line of names the most columns."""

import csv
import io
from collections.abc import Iterator
from itertools import count
from typing import Any

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.rows.tables.text import TextFile, kind_of, not_text, open_utf8

_SEPARATORS = ",;\t|"


def csv_rows(file: TextFile, encoding: str = "") -> Iterator[tuple[int, Any]]:
    """The rows of a table with a line of names, counted from 1; a damaged row is its error.

    In .tsv, as in PartiPrompts, quotation marks mean themselves.

    Raises:
        DataError: two columns of one name.
    """
    with (
        open_utf8(file, encoding) as raw,
        io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        first = stream.readline()
        if len(first.strip()) == 5 and first.startswith("sep="):  # written for Excel
            separator, first = first[4], stream.readline()
        else:
            separator = _separator(first)
        literal = kind_of(file) == ".tsv"
        lines = _with_first(first, stream)
        spaced = not literal and f"{separator} " in first
        rows = csv.reader(lines, delimiter="\t" if literal else separator, skipinitialspace=spaced,
                          quoting=csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL)  # fmt: skip
        try:
            names = [name.strip() for name in next(rows, [])]
        except csv.Error as error:
            raise DataError(f"{file}: its first line is not CSV ({error})") from error
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{file}: has two columns {twice!r}; rename or remove one")
        for number in count(1):
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, ValueError(f"is not CSV ({error})")
                continue
            if row:
                yield number, _row(names, row)


def _separator(line: str) -> str:
    def columns(separator: str) -> int:
        return len(next(csv.reader([line], delimiter=separator), []))

    try:
        return max(_SEPARATORS, key=columns)  # the first of several with most
    except csv.Error:
        return ","


def _with_first(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _row(names: list[str], row: list[str]) -> dict[str, str | None] | ValueError:
    if len(row) > len(names) and any(cell.strip() for cell in row[len(names) :]):
        return ValueError(
            f"has {len(row)} cells for {len(names)} columns: put texts with separators into quotation marks"
        )
    for cell in row:
        try:
            cell.encode()
        except UnicodeEncodeError:
            data = cell.encode("utf-8", "surrogateescape")
            try:
                data.decode()
            except UnicodeDecodeError as error:
                return ValueError(not_text(error, data))
    padded = [*row, *[None] * (len(names) - len(row))]
    return {name: cell for name, cell in zip(names, padded, strict=False) if name}
