"""What a training learns from: rows of any layout in one form, the pairs and rankings of them, and how they are saved.

No picture is read until it is asked for, so a set of any size is listed in seconds.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.data import disk
from diffusion_align.data.rows.raw_rows import ParquetItem, StoredPicture, TarMember, ZipMember, read_bytes


@dataclass(frozen=True, slots=True)
class DataRow:
    """K pictures of one prompt and what is known of them, whatever the layout.

    Attributes:
        id: file:row, or file:key.
        pictures: [K]; none for a prompt alone, one for a caption.
        relevance: [K] in [0, 1], higher is better; all equal is a tie. Empty if nobody compared, as for captions.
        scores: [M][K], of M rewards, if they were kept.
        weight: how much the preference counts, 1 if the layout has no weight; 0 is a tie.
        source: the layout, or what the data itself names.
        models: [K] who made the pictures, or empty.
    """

    id: str
    prompt: str
    pictures: tuple[StoredPicture, ...] = ()
    relevance: tuple[float, ...] = ()
    scores: tuple[tuple[float, ...], ...] = ()
    weight: float = 1.0
    source: str = ""
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures of one prompt, the preferred one first. `id` is file:row; `weight` scales its loss.

    A tie, which only `read_pairs(keep_ties=True)` gives, prefers neither: `tie` is true, and its pictures are in the
    order of the data.
    """

    id: str
    prompt: str
    winner: StoredPicture
    loser: StoredPicture
    weight: float = 1.0
    tie: bool = False

    @property
    def pictures(self) -> tuple[StoredPicture, ...]:
        """[winner, loser]: a pair is a ranking of two."""
        return self.winner, self.loser


@dataclass(frozen=True, slots=True)
class Ranking:
    """K >= 2 pictures of one prompt and how good each is: `relevance` [K] in [0, 1], higher is better, not all equal.

    Relevance is phi of RankDPO. `id` is file:row; `scores` [M][K] are those of M rewards, if they were kept.
    """

    id: str
    prompt: str
    pictures: tuple[StoredPicture, ...]
    relevance: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...] = ()


def is_tie(row: DataRow) -> bool:
    """Whether a row that compares pictures prefers none."""
    return row.weight == 0 or len(set(row.relevance)) < 2


def row_pairs(row: DataRow) -> list[Pair]:
    """Every two pictures of which one is more relevant, each with the row's weight; none for a tie.

    Of K > 2 pictures there are up to K (K - 1) / 2, named id[winner>loser].
    """
    if is_tie(row):
        return []
    phi, pictures = row.relevance, row.pictures
    ordered = [(i, j) for i in range(len(phi)) for j in range(len(phi)) if phi[i] > phi[j]]
    name = (lambda i, j: row.id) if len(phi) == 2 else (lambda i, j: f"{row.id}[{i}>{j}]")
    return [Pair(name(i, j), row.prompt, pictures[i], pictures[j], row.weight) for i, j in ordered]


def row_ties(row: DataRow) -> list[Pair]:
    """Every two pictures of which none is preferred, in the data's order; all of a row of weight 0."""
    phi, pictures = row.relevance, row.pictures
    places = [(i, j) for i in range(len(phi)) for j in range(i + 1, len(phi)) if row.weight == 0 or phi[i] == phi[j]]
    name = (lambda i, j: row.id) if len(phi) == 2 else (lambda i, j: f"{row.id}[{i}={j}]")
    return [Pair(name(i, j), row.prompt, pictures[i], pictures[j], tie=True) for i, j in places]


def row_ranking(row: DataRow) -> Ranking | None:
    """The row as a ranking; None for a tie.

    A ranking has no weight. With two pictures it moves into the relevance: 1 and 0 with weight w become (1 + w) / 2 and
    (1 - w) / 2, so a vote of 70 to 30 (w = 0.4) is relevance 0.7 and 0.3. With more pictures it is left out.
    """
    if is_tie(row):
        return None
    phi = row.relevance
    if len(phi) == 2 and row.weight < 1:
        middle, gap = (phi[0] + phi[1]) / 2, (phi[0] - phi[1]) / 2
        phi = (middle + row.weight * gap, middle - row.weight * gap)
    return Ranking(row.id, row.prompt, row.pictures, phi, row.scores)


def fingerprint(lists: Sequence[Pair | Ranking]) -> str:
    """A digest of pairs or rankings, in order: of prompts, pictures and a pair's weight, but not of ids or places.

    A ranking's relevance does not count, but with a parquet file's pictures its whole content does. Pictures in memory
    count in full; files count by `disk.file_digest`.
    """
    file_digest = cache(disk.file_digest)

    def name(picture: StoredPicture) -> str:
        if isinstance(picture, bytes):
            return disk.digest(picture)
        if isinstance(picture, Path):
            return file_digest(picture) if picture.is_file() else "absent"
        if isinstance(picture, TarMember):
            return f"{file_digest(picture.file)}:{picture.offset}:{picture.size}"
        if isinstance(picture, ZipMember):
            return f"{file_digest(picture.file)}:{picture.member}"
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
    pictures_0: Sequence[StoredPicture],
    pictures_1: Sequence[StoredPicture],
    label_0: Sequence[float],
    extra: Mapping[str, Sequence[float]] | None = None,
    rows_per_group: int = 256,
) -> None:
    """Write pairs in the Pick-a-Pic layout: caption, jpg_0, jpg_1, label_0, label_1 = 1 - label_0, then the extra
    columns.

    The picture columns take any bytes that Pillow reads, in spite of their name. `label_0` is 1 (the first picture
    won), 0 (the second) or 0.5 (tie). Pictures are read a row group at a time, so a set of any size can be written.
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
        chunk = {name: list(values[start : start + rows_per_group]) for name, (_, values) in columns.items()}
        return chunk | {name: [read_bytes(picture) for picture in chunk[name]] for name in ("jpg_0", "jpg_1")}

    schema = pa.schema({name: kind for name, (kind, _) in columns.items()})
    _write_groups(path, schema, (group(start) for start in range(0, len(captions), rows_per_group)))


def write_rankings_parquet(path: str | os.PathLike[str], rankings: Iterable[Ranking], rows_per_group: int = 64) -> None:
    """Write rankings as parquet: prompt, images (a list of bytes), relevance [K], scores [M][K].

    Pictures are read a row group at a time, and the rankings may come from a generator.
    """
    numbers = pa.list_(pa.float64())
    kinds = {"prompt": pa.string(), "images": pa.list_(pa.binary()), "relevance": numbers, "scores": pa.list_(numbers)}

    def groups() -> Iterable[dict[str, Any]]:
        rest = iter(rankings)
        while chunk := list(islice(rest, rows_per_group)):
            yield {
                "prompt": [ranking.prompt for ranking in chunk],
                "images": [[read_bytes(picture) for picture in ranking.pictures] for ranking in chunk],
                "relevance": [ranking.relevance for ranking in chunk],
                "scores": [ranking.scores for ranking in chunk],
            }

    _write_groups(path, pa.schema(kinds), groups())


def _write_groups(path: str | os.PathLike[str], schema: pa.Schema, groups: Iterable[Mapping[str, Any]]) -> None:
    """Write a parquet file, a row group for each mapping of columns; it appears complete or not at all."""
    with disk.replacing(Path(path)) as staged, pq.ParquetWriter(staged, schema, write_page_checksum=True) as writer:
        for columns in groups:
            writer.write_table(pa.table(dict(columns), schema=schema))
