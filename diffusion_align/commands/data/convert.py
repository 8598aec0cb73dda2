"""`data convert`: any set that compares pictures, as shards of parquet that hold the pictures themselves.

    <out>/rows-00000.parquet    prompt, images [K] (bytes), relevance [K], scores [M][K], weight, source, models [K]
          convert.json          what is converted, and whether all of it is; a folder that is not complete is not read
          bad_rows.jsonl        the rows left out, with reasons; written at the end

A shard appears complete or not at all and holds the same rows every time, so a conversion that was killed goes on after
the last one. Its own bad rows are in its metadata. One row group of pictures is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_align.commands.data.fetch import read_options
from diffusion_align.commands.data.summary import summarise_data
from diffusion_align.commands.printed_commands import command_line
from diffusion_align.data.bad_rows import BadRow, DataError, bad_row_lines, require_few_bad
from diffusion_align.data.disk import digest, file_digest, replacing, write_bytes
from diffusion_align.data.pairs_and_rankings import DataRow, is_tie, row_pairs
from diffusion_align.data.read import read_rows
from diffusion_align.data.rows.raw_rows import read_bytes
from diffusion_align.data.rows.recognise import UNFINISHED, DataSource, recognise_preferences
from diffusion_align.options.data import DataConvert
from diffusion_align.system.progress import progress_bar

CONVERSION_FORMAT = 1
# Bytes of pictures in a row group: large enough to read fast, small enough to hold two.
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


def data_convert(options: DataConvert) -> int:
    """Convert, or go on where a conversion was stopped.

    Raises:
        DataError: the set compares no pictures, or has no row that prefers one; --out holds something else; or more
            than --max_bad_fraction of the rows are bad.
    """
    o = options
    assert o.path is not None and o.out is not None  # the options' own check requires them
    source, out = _source(o), Path(o.out)
    found = summarise_data(source)
    if not found.used:
        raise DataError(f"{source.path}: {found.rows} rows, {found.ties} ties, {found.broken} bad: nothing to convert")
    try:
        counts = _claim(source, o)
        if counts is None:
            with progress_bar(total=found.rows, desc="convert", unit="row") as bar:
                counts = _convert(source, o, found.rows, lambda done: bar.update(done - bar.n))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished stays in {out}; the same command goes on") from None
    print(
        f"{counts['rows']} rows: {counts['written']} {o.to} written, {counts['ties']} ties dropped, "
        f"{counts['broken']} bad, in {out}\n"
        f"next, or with train rankdpo: {command_line('train', 'dpo', '--model', 'MODEL', '--train_data_dir', out)}"
    )
    return 0


def _source(o: DataConvert) -> DataSource:
    return recognise_preferences(Path(o.path or "").expanduser(), o.split, options=read_options(o))


def _claim(source: DataSource, o: DataConvert) -> dict[str, int] | None:
    """Write down what the folder is for; its counts if it is complete, DataError if it holds something else."""
    out = Path(o.out or "")
    files = [[file.name, file_digest(file if isinstance(file, Path) else file.file)] for file in source.files]
    facts = {
        "format": CONVERSION_FORMAT,
        "layout": source.layout.name,
        "data": digest(json.dumps(files).encode()),
        "to": o.to,
        "rows_per_shard": o.rows_per_shard,
    }
    state = out / UNFINISHED
    if state.is_file():
        known = json.loads(state.read_text(encoding="utf-8"))
        other = [name for name in facts if known.get(name) != facts[name]]
        if other:
            raise DataError(f"{out}: holds a conversion with other {', '.join(other)}; choose another --out")
        return known["counts"] if known["complete"] else None
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(state, json.dumps(facts | {"complete": False}, indent=1).encode())
    return None


def _convert(source: DataSource, o: DataConvert, total: int, report: Callable[[int], object]) -> dict[str, int]:
    """Write the shards that are missing; counts of rows, written, ties and broken. `report` is told the rows done."""
    out, bad = Path(o.out or ""), []
    counts = {"rows": 0, "written": 0, "ties": 0, "broken": 0}
    good = _good(source, bad, counts)
    for number, rows in enumerate(iter(lambda: list(islice(good, o.rows_per_shard)), [])):
        path = out / f"rows-{number:05d}.parquet"
        facts = _facts(path) if path.is_file() else _write(path, rows, o.to)
        counts["written"] += facts["written"]
        bad += [BadRow(row, reason) for row, reason in facts["bad"]]
        report(counts["rows"])
        require_few_bad(str(source.path), bad, total, o.max_bad_fraction)
    require_few_bad(str(source.path), bad, total, o.max_bad_fraction)
    counts["broken"] = len(bad)
    write_bytes(out / "bad_rows.jsonl", bad_row_lines(bad).encode())
    state = json.loads((out / UNFINISHED).read_text(encoding="utf-8"))
    write_bytes(out / UNFINISHED, json.dumps(state | {"complete": True, "counts": counts}, indent=1).encode())
    return counts


def _good(source: DataSource, bad: list[BadRow], counts: dict[str, int]) -> Iterator[DataRow]:
    """The rows that prefer something; the others are counted."""
    for row in read_rows(source):
        counts["rows"] += 1
        if isinstance(row, BadRow):
            bad.append(row)
        elif is_tie(row):
            counts["ties"] += 1
        else:
            yield row


def _write(path: Path, rows: list[DataRow], to: str) -> dict[str, Any]:
    """Write one shard without the rows whose pictures cannot be read; its facts, which `_facts` reads back."""
    facts: dict[str, Any] = {"written": 0, "bad": []}
    with replacing(path) as staged, pq.ParquetWriter(staged, SCHEMA, write_page_checksum=True) as writer:
        for group in _groups(_entries(rows, to, facts["bad"])):
            writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
            facts["written"] += len(group)
        writer.add_key_value_metadata({"diffusion_align": json.dumps(facts)})
    return facts


def _facts(path: Path) -> dict[str, Any]:
    """How many rows a finished shard has, and which were left out."""
    return json.loads((pq.read_metadata(path).metadata or {})[b"diffusion_align"])


def _entries(rows: list[DataRow], to: str, bad: list[list[str]]) -> Iterator[dict[str, Any]]:
    for row in rows:
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


def _split(row: DataRow) -> list[DataRow]:
    """A row of K pictures as rows of two, the winner first."""
    made = dict(zip(row.pictures, row.models, strict=True)) if row.models else {}
    pairs = row_pairs(row)
    models = [tuple(made[picture] for picture in pair.pictures) if made else () for pair in pairs]
    return [
        replace(row, id=pair.id, pictures=pair.pictures, relevance=(1.0, 0.0), scores=(), models=named)
        for pair, named in zip(pairs, models, strict=True)
    ]


def _groups(entries: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Entries by row group, which ends once its pictures reach a size."""
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
