"""Preference pairs from every layout that compares pictures (`formats`), recognised without flags.

No picture is read here: a pair holds a path, or the file, row and column of a parquet cell, or the place of a member in
its archive, so a set of any size is listed in seconds. Rows that cannot make a pair are counted with their reason;
broken pictures are found when the cache is built, or by `data check`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.data import raw_rows
from diffusion_align.data.layouts import Pair, ParquetItem, Picture, Ranking, read_bytes
from diffusion_align.data.raw_rows import BadRow, DataError
from diffusion_align.data.read import Source, recognise, rows
from diffusion_align.data.rows import pairs_of, ties_of
from diffusion_align.data.tar_rows import TarMember

__all__ = ["Counts", "Pair", "Picture", "check_bad_fraction", "fingerprint", "read_pairs", "write_pairs_parquet"]

_LAYOUTS = (
    "parquet with jpg_0, jpg_1, label_0, label_1, caption (or prompt, chosen, rejected); a folder with metadata.jsonl; "
    "a .jsonl with prompt, chosen, rejected; or another layout that `data inspect` knows"
)


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the rows: used, a tie or broken. A row that ranks K pictures gives several pairs, so `used` may be
    more than there are rows."""

    rows: int
    used: int
    ties: int
    broken: int
    bad_rows: tuple[BadRow, ...] = ()
    what: str = "pairs"

    def __str__(self) -> str:
        return f"{self.rows} rows: {self.used} {self.what}, {self.ties} ties dropped, {self.broken} broken"


def read_pairs(
    path: str | os.PathLike[str], *, split: str = "train", max_bad_fraction: float = 0.01, keep_ties: bool = False
) -> tuple[list[Pair], Counts]:
    """Read preference pairs from any layout that compares pictures.

    A tie carries no preference: it is dropped and counted, never taken as a win. With `keep_ties` it is a pair whose
    `tie` is true, for methods that can learn from it. A ranking gives a pair for every two pictures of different
    relevance. Where files are named by split (train-00000-of-00002.parquet), only `split` is read, so that a test split
    never slips into training.

    Raises:
        DataError: unknown layout, missing column, a path outside the data's folder, nothing left, only ties, no
            preference at all, or more than `max_bad_fraction` of the rows broken. The message is one line with the
            file, the row or key, and the cure.
    """
    source = comparing(path, split, _LAYOUTS)
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    ties = count = 0
    for entry in rows(source):
        count += 1
        if isinstance(entry, BadRow):
            bad.append(entry)
        else:
            found = pairs_of(entry) + (ties_of(entry) if keep_ties else [])
            ties += not found
            pairs += found
    return pairs, tally(path, count, len(pairs), ties, bad, max_bad_fraction, "pairs", source.format.tie)


def comparing(path: str | os.PathLike[str], split: str, layouts: str) -> Source:
    """What a path holds; DataError when that compares no pictures, with what it is good for."""
    source = recognise(Path(path), split, layouts)
    if source.format.holds in ("captions", "prompts"):
        raise DataError(
            f"{path}: {source.format.name}, which say nothing of what people prefer; data synth draws pictures of "
            f"prompts and ranks them; to train on, give {layouts}"
        )
    return source


def tally(
    source: str | os.PathLike[str],
    rows: int,
    used: int,
    ties: int,
    bad: Sequence[BadRow],
    max_bad_fraction: float,
    what: str,
    tie: str,
) -> Counts:
    """The counts of what was read; DataError when nothing can be learnt from it, or too much of it is broken.

    `what` names the rows, in the plural; `tie` says how a tie is known.
    """
    counts = Counts(rows, used, ties, len(bad), tuple(bad), what)
    if counts.rows == 0:
        raise DataError(f"{source}: holds no rows; is this the right file?")
    if ties and ties == counts.rows:
        raise DataError(f"{source}: all {ties} rows are ties ({tie}); there is no preference to learn from")
    check_bad_fraction(str(source), bad, counts.rows, max_bad_fraction)
    if not used:
        one = what.removesuffix("s")
        raise DataError(f"{source}: no {one} is left ({counts}); the first bad row: {bad[0].row} {bad[0].reason}")
    return counts


def check_bad_fraction(source: str, bad: Sequence[BadRow], rows: int, max_bad_fraction: float) -> None:
    """Raise DataError, naming the first bad row, when more than `max_bad_fraction` of the rows are bad."""
    if len(bad) > max_bad_fraction * rows:
        raise DataError(
            f"{source}: {len(bad)} of {rows} rows are broken, more than max_bad_fraction={max_bad_fraction:g} allows; "
            f"the first: {bad[0].row} {bad[0].reason}; repair or remove them, or raise max_bad_fraction"
        )


def fingerprint(lists: Sequence[Pair | Ranking]) -> str:
    """A name for the content of some lists, in order: prompts, pictures and a pair's weight, but not ids or places.

    A ranking's relevance does not count, but with a parquet file's pictures its whole content does. Pictures in memory
    count in full; files count by `raw_rows.file_digest`.
    """
    file_digest = cache(raw_rows.file_digest)

    def name(picture: Picture) -> str:
        if isinstance(picture, bytes):
            return raw_rows.digest(picture)
        if isinstance(picture, Path):
            return file_digest(picture) if picture.is_file() else "absent"
        if isinstance(picture, TarMember):
            return f"{file_digest(picture.file)}:{picture.offset}:{picture.size}"
        cell = f"{file_digest(picture.file)}:{picture.row}:{picture.column}"
        return f"{cell}:{picture.item}" if isinstance(picture, ParquetItem) else cell

    state = hashlib.blake2b(digest_size=16)
    for entry in lists:
        row = [entry.prompt, *map(name, entry.pictures), *([entry.weight] if isinstance(entry, Pair) else [])]
        state.update(json.dumps(row).encode() + b"\n")
    return state.hexdigest()


def write_pairs_parquet(
    path: str | os.PathLike[str],
    captions: Sequence[str],
    pictures_0: Sequence[Picture],
    pictures_1: Sequence[Picture],
    label_0: Sequence[float],
    extra: Mapping[str, Sequence[float]] | None = None,
    rows_per_group: int = 256,
) -> None:
    """Write pairs in the Pick-a-Pic layout: caption, jpg_0, jpg_1, label_0, label_1 = 1 - label_0, then the extra
    columns.

    The picture columns take any bytes that Pillow reads, in spite of their name. `label_0` is 1 (the first picture
    won), 0 (the second) or 0.5 (tie). The file appears whole or not at all. Pictures given by their place are read a
    row group at a time, so a set of any size can be written.
    """
    columns: dict[str, tuple[pa.DataType, Sequence[Any]]] = {
        "caption": (pa.string(), captions),
        "jpg_0": (pa.binary(), pictures_0),
        "jpg_1": (pa.binary(), pictures_1),
        "label_0": (pa.float64(), [float(label) for label in label_0]),
        "label_1": (pa.float64(), [1.0 - label for label in label_0]),
    }
    for name, values in (extra or {}).items():
        if name in columns:
            raise ValueError(f"extra column {name!r} is one of the layout's own")
        columns[name] = pa.float64(), [float(value) for value in values]
    lengths = {name: len(values) for name, (_, values) in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"columns differ in length: {lengths}")
    wrong = sorted(set(columns["label_0"][1]) - {0.0, 0.5, 1.0})
    if wrong:
        raise ValueError(f"label_0 must be 1, 0 or 0.5, not {wrong[0]}")

    def group(start: int) -> dict[str, list[Any]]:
        part = {name: list(values[start : start + rows_per_group]) for name, (_, values) in columns.items()}
        return part | {name: [read_bytes(picture) for picture in part[name]] for name in ("jpg_0", "jpg_1")}

    schema = pa.schema({name: kind for name, (kind, _) in columns.items()})
    write_groups(path, schema, (group(start) for start in range(0, len(captions), rows_per_group)))


def write_groups(path: str | os.PathLike[str], schema: pa.Schema, groups: Iterable[Mapping[str, Any]]) -> None:
    """Write a parquet file, a row group for each mapping of columns; it appears whole or not at all."""
    target = Path(path)
    staged = target.with_name(f".tmp-{target.name}")
    with pq.ParquetWriter(staged, schema, write_page_checksum=True) as writer:
        for columns in groups:
            writer.write_table(pa.table(dict(columns), schema=schema))
    os.replace(staged, target)
