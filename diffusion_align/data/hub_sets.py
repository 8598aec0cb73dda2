"""Data sets of any format that `datasets` reads, streamed once into parquet files on this disk.

<folder>/train-00000.parquet    rows as the set has them, with their pictures' bytes
         streamed.json          which set this is; written last

Pictures are not decoded here. A set of which only some pairs are wanted is streamed no further than they reach.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.data.bad_rows import BadRow
from diffusion_align.data.disk import digest, write_bytes
from diffusion_align.data.pairs_and_rankings import row_pairs
from diffusion_align.data.read import read_rows
from diffusion_align.data.rows.archives.limits import PICTURE_SUFFIXES, TEXT_SUFFIXES
from diffusion_align.data.rows.known_layouts import layout_of
from diffusion_align.data.rows.recognise import recognise
from diffusion_align.data.rows.tables.columns import renamed, renaming
from diffusion_align.data.rows.tables.text import PLAIN, ReadOptions
from diffusion_align.system.progress import progress_bar

DONE = "streamed.json"
_ROWS_PER_FILE = 1000
_ROWS_AT_A_TIME = 16


@dataclass(frozen=True)
class HubSet:
    """A data set by name.

    Attributes:
        config: its configuration; None for the default.
        revision: a commit, so that a set that changes is fetched again.
        most: how many pairs are wanted; None for all.
    """

    name: str
    split: str
    config: str | None = None
    revision: str | None = None
    most: int | None = None


def stream_set(wanted: HubSet, under: Path, options: ReadOptions = PLAIN) -> Path | None:
    """The folder of a set, streamed unless it is there already; processes wait for the one that streams it. None if
    `datasets` does not find pictures that are compared in its columns: then the set's own files say more.

    Raises:
        Exception: of `datasets`, of its HTTP library and of the system, if the stream ends early.
    """
    key = digest(json.dumps(asdict(wanted), sort_keys=True).encode())[:16]
    folder, staged = under / key, under / f".streaming-{key}"
    under.mkdir(parents=True, exist_ok=True)
    with (under / f".{key}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / DONE).is_file():
            return folder
        rows = _tables(wanted, options)
        if rows is None:
            return None
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        _write(wanted, rows, staged, options)
        write_bytes(staged / DONE, json.dumps(asdict(wanted)).encode())
        os.replace(staged, folder)
    return folder


def _write(wanted: HubSet, rows: Iterator[pa.Table], folder: Path, options: ReadOptions) -> None:
    pairs = 0
    with progress_bar(desc=f"stream {wanted.name}", unit="row") as bar:
        for number in count():
            path, written = folder / f"{wanted.split}-{number:05d}.parquet", 0
            table = next(rows, None)
            if table is None:
                return
            with pq.ParquetWriter(path, table.schema, write_page_checksum=True) as writer:
                while table is not None:
                    writer.write_table(table)
                    bar.update(table.num_rows)
                    written += table.num_rows
                    table = next(rows, None) if written < _ROWS_PER_FILE else None
            if wanted.most is not None:
                pairs += _pairs_in(path, wanted.split, options)
                if pairs >= wanted.most:
                    return


def _pairs_in(path: Path, split: str, options: ReadOptions) -> int:
    found = read_rows(recognise(path, split, options=options))
    return sum(len(row_pairs(row)) for row in found if not isinstance(row, BadRow))


def _tables(wanted: HubSet, options: ReadOptions) -> Iterator[pa.Table] | None:
    """The rows of a set, a few at a time, with pictures as {bytes, path}; None if they compare no pictures."""
    import datasets

    try:
        known = datasets.load_dataset(
            wanted.name, wanted.config, split=wanted.split, streaming=True, revision=wanted.revision
        )
    except Exception:  # a script, files of several kinds, no connection: the download of its files says which
        return None
    if known.features is None:  # texts without pictures
        return None
    plain = datasets.Features({name: _undecoded(feature) for name, feature in known.features.items()})
    names = [_column(name) for name in plain]
    pictures = [names[place] for place, feature in enumerate(plain.values()) if _holds_pictures(feature)]
    layout = layout_of(renamed(names, renaming(wanted.name, names, options.columns)))
    if not pictures or layout is None or not layout.compares:
        return None
    return _embedded(known.cast(plain).iter(batch_size=_ROWS_AT_A_TIME), plain.arrow_schema, names)


def _embedded(batches: Any, schema: pa.Schema, names: list[str]) -> Iterator[pa.Table]:
    from datasets.table import embed_table_storage

    for rows in batches:
        table = embed_table_storage(pa.table(rows, schema=schema))
        # Their description of the columns would make other readers decode the pictures.
        yield table.replace_schema_metadata(None).rename_columns(names)


def _holds_pictures(feature: Any) -> bool:
    import datasets

    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _undecoded(feature: Any) -> Any:
    """The feature, with pictures left as {bytes, path}."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature), length=feature.length)
    return feature


def _column(name: str) -> str:
    """jpg_0.jpg -> jpg_0: the columns of archives keep the suffix of their members."""
    stem, _, suffix = name.rpartition(".")
    return stem if stem and suffix.lower() in PICTURE_SUFFIXES | TEXT_SUFFIXES else name
