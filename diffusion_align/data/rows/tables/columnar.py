"""Rows of parquet and arrow files, one at a time: a row group in memory, without its pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.data.rows.known_layouts import Layout
from diffusion_align.data.rows.raw_rows import RawRow
from diffusion_align.data.rows.tables.cells import is_arrow, open_arrow, open_parquet, parquet_damage
from diffusion_align.data.rows.tables.columns import renamed

COLUMNAR = (".parquet", ".arrow")


def parquet_rows(file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some (small) columns of a parquet or arrow file as rows, one row group in memory at a time.

    A cell that cannot be a Python value, such as text that is not UTF-8, becomes the error that says so.

    Raises:
        DataError: the file or one of its row groups is damaged.
    """
    for read in _groups(file, columns):
        with parquet_damage(f"{file}: is damaged"):
            values = [_values(read.column(name)) for name in columns]
        for row in range(read.num_rows):
            yield {name: column[row] for name, column in zip(columns, values, strict=True)}


def _groups(file: Path, columns: list[str]) -> Iterator[pa.Table]:
    if is_arrow(file):
        with parquet_damage(f"{file}: cannot be read as arrow"):
            batches = open_arrow(file).select(columns).to_batches()
        for number, batch in enumerate(batches):
            with parquet_damage(f"{file}: record batch {number} is damaged"):
                batch.validate(full=True)
                group = pa.Table.from_batches([batch])
            yield group
        return
    with parquet_damage(f"{file}: cannot be read as parquet"):
        table = open_parquet(file)
    with table:
        for number in range(table.num_row_groups):
            with parquet_damage(f"{file}: row group {number} is damaged"):
                group = table.read_row_group(number, columns=columns)
            yield group


def parquet_schema(file: Path) -> pa.Schema:
    """The columns of a parquet or arrow file and their types."""
    with parquet_damage(f"{file}: cannot be read as {'arrow' if is_arrow(file) else 'parquet'}"):
        schema = open_arrow(file).schema if is_arrow(file) else pq.read_schema(file)
        schema.names  # noqa: B018  (decodes them: a damaged one shows here)
        return schema


def columnar_rows(file: Path, layout: Layout, names: dict[str, str], under: tuple[str, ...]) -> Iterator[RawRow]:
    """The rows of a file. `names`: their names for columns -> ours."""
    schema = parquet_schema(file)
    theirs = renamed(schema.names, names)
    named = layout.reads(theirs)
    cells = {name: theirs[name] for name in named if _holds_bytes(schema.field(theirs[name]).type)}
    small = [name for name in named if name not in cells]
    for row, values in enumerate(parquet_rows(file, [theirs[name] for name in small])):
        ours = {name: values[theirs[name]] for name in small}
        yield RawRow(f"{file.name}:{row}", ours, file, row, cells, file.parent, under)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds pictures themselves: bytes, {bytes, path}, or a list of either."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


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
