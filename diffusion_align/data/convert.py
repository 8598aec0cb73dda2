"""Any set that compares pictures as this project's own: shards of parquet that hold the pictures themselves.

    <out>/rows-00000.parquet    prompt, images [K] (bytes), relevance [K], scores [M][K], weight, source, models [K]
          convert.json          what is converted, and whether all of it is; a folder that is not complete is not read
          bad_rows.jsonl        the rows left out, with reasons; written at the end

A shard appears whole or not at all and holds the same rows every time, so a conversion that was killed goes on behind
the last one. Its own broken rows stand in its metadata. One row group of pictures is in memory at a time.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.data.layouts import read_bytes
from diffusion_align.data.pairs_and_rankings import check_bad_fraction
from diffusion_align.data.raw_rows import BadRow, DataError, digest, file_digest
from diffusion_align.data.read import UNFINISHED, Source, rows
from diffusion_align.data.rows import Row, is_tie, pairs_of

FORMAT = 1
# A row group is written once it holds this much: large enough to read fast, small enough to hold two.
_GROUP = 32 << 20
_NUMBERS = pa.list_(pa.float64())
SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "images": pa.list_(pa.binary()),
        "relevance": _NUMBERS,
        "scores": pa.list_(_NUMBERS),
        "weight": pa.float64(),
        "source": pa.string(),
        "models": pa.list_(pa.string()),
    }
)


def convert(
    source: Source,
    out: Path,
    *,
    to: str,
    total: int,
    max_bad_fraction: float = 0.01,
    rows_per_shard: int = 4096,
    reach: Callable[[int], object] = lambda done: None,
) -> dict[str, int]:
    """Write a source to `out`, or go on where a conversion stopped; returns counts of rows, written, ties and broken.

    Args:
        to: "rankings" keeps each row's pictures together; "pairs" makes a row of every two of different relevance.
        total: rows of the source, for the ceiling.
        reach: told after each shard how many rows are done.

    Raises:
        DataError: `out` holds something else, more than `max_bad_fraction` of the rows are broken, or as
            `recognise.rows`.
    """
    counts = _claim(source, out, to, rows_per_shard)
    if counts is not None:
        return counts
    bad: list[BadRow] = []
    counts = {"rows": 0, "written": 0, "ties": 0, "broken": 0}
    good = _good(source, bad, counts)
    for number, part in enumerate(iter(lambda: list(islice(good, rows_per_shard)), [])):
        path = out / f"rows-{number:05d}.parquet"
        facts = _facts(path) if path.is_file() else _write(path, part, to)
        counts["written"] += facts["written"]
        bad += [BadRow(row, reason) for row, reason in facts["bad"]]
        reach(counts["rows"])
        check_bad_fraction(str(source.path), bad, total, max_bad_fraction)
    check_bad_fraction(str(source.path), bad, total, max_bad_fraction)
    counts["broken"] = len(bad)
    lines = [json.dumps({"row": row.row, "reason": row.reason}) + "\n" for row in bad]
    _write_text(out / "bad_rows.jsonl", "".join(lines))
    state = json.loads((out / UNFINISHED).read_text(encoding="utf-8"))
    _write_text(out / UNFINISHED, json.dumps(state | {"complete": True, "counts": counts}, indent=1))
    return counts


def _claim(source: Source, out: Path, to: str, rows_per_shard: int) -> dict[str, int] | None:
    """Write down what the folder is for; the counts if it is there complete, DataError if it is something else."""
    files = [[file.name, file_digest(file)] for file in source.files]
    wanted = {
        "format": FORMAT,
        "layout": source.format.name,
        "data": digest(json.dumps(files).encode()),
        "to": to,
        "rows_per_shard": rows_per_shard,
    }
    state = out / UNFINISHED
    if state.is_file():
        known = json.loads(state.read_text(encoding="utf-8"))
        other = [name for name in wanted if known.get(name) != wanted[name]]
        if other:
            raise DataError(f"{out}: holds a conversion with other {', '.join(other)}; choose another --out")
        return known["counts"] if known["complete"] else None
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _write_text(state, json.dumps(wanted | {"complete": False}, indent=1))
    return None


def _good(source: Source, bad: list[BadRow], counts: dict[str, int]) -> Iterator[Row]:
    """The rows that prefer something; the others are counted."""
    for row in rows(source):
        counts["rows"] += 1
        if isinstance(row, BadRow):
            bad.append(row)
        elif is_tie(row):
            counts["ties"] += 1
        else:
            yield row


def _write(path: Path, part: list[Row], to: str) -> dict[str, Any]:
    """Write one shard, leaving out rows whose pictures cannot be read; what `_facts` reads back."""
    facts: dict[str, Any] = {"written": 0, "bad": []}
    staged = path.with_name(f".tmp-{path.name}")
    with pq.ParquetWriter(staged, SCHEMA) as writer:
        for group in _groups(_entries(part, to, facts["bad"])):
            writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
            facts["written"] += len(group)
        writer.add_key_value_metadata({"diffusion_align": json.dumps(facts)})
    os.replace(staged, path)
    return facts


def _facts(path: Path) -> dict[str, Any]:
    """How many rows a finished shard has, and which were left out."""
    return json.loads((pq.read_metadata(path).metadata or {})[b"diffusion_align"])


def _entries(part: list[Row], to: str, bad: list[list[str]]) -> Iterator[dict[str, Any]]:
    for row in part:
        try:
            data = {picture: read_bytes(picture) for picture in row.pictures}
        except (DataError, OSError) as error:
            bad.append([row.id, f"a picture cannot be read ({error})"])
            continue
        for one in _split(row) if to == "pairs" else [row]:
            yield {
                "prompt": one.prompt,
                "images": [data[picture] for picture in one.pictures],
                "relevance": one.relevance,
                "scores": one.scores,
                "weight": one.weight,
                "source": one.source,
                "models": one.models,
            }


def _split(row: Row) -> list[Row]:
    """A row of K pictures as rows of two, the winner first."""
    made = dict(zip(row.pictures, row.models, strict=True)) if row.models else {}
    pairs = pairs_of(row)
    models = [tuple(made[picture] for picture in pair.pictures) if made else () for pair in pairs]
    return [
        replace(row, id=pair.id, pictures=pair.pictures, relevance=(1.0, 0.0), scores=(), models=named)
        for pair, named in zip(pairs, models, strict=True)
    ]


def _groups(entries: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Entries by row group, cut where the pictures reach a size."""
    group: list[dict[str, Any]] = []
    size = 0
    for entry in entries:
        group.append(entry)
        size += sum(map(len, entry["images"]))
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_text(path: Path, text: str) -> None:
    staged = path.with_name(f".tmp-{path.name}")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)
