"""Rankings: K pictures of one prompt and how good each is, from the layouts people have, recognised without flags.

| given | layout |
|---|---|
| parquet file, or folder of them | prompt (or caption), images (a list), and relevance, scores or ranks |
| .jsonl file, or folder with metadata.jsonl | the same keys; images are paths relative to the file |
| preference pairs, in any layout of `pairs` | rankings of two, relevance 1 and 0 |

`relevance` [K] is phi of RankDPO, in [0, 1], higher is better. Where it is absent it is the share of comparisons that
each picture wins: by `scores`, [K] or those of several scorers [M][K], higher is better, or by `ranks` [K], 1 the best.
No picture is read here, and rows that cannot make a ranking are counted with their reason, as for pairs.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from diffusion_align.data import readers
from diffusion_align.data.layouts import (
    Pair,
    ParquetItem,
    Picture,
    Ranking,
    find_picture,
    prompt_fault,
    read_bytes,
    read_jsonl,
    read_parquet,
)
from diffusion_align.data.pairs import Counts, find_files, tally, write_groups
from diffusion_align.data.readers import BadRow, DataError
from diffusion_align.objectives import win_counts

__all__ = ["Ranking", "read_rankings", "write_rankings_parquet"]

VALUES = ("relevance", "scores", "ranks")
MOST = sys.float_info.max
_LAYOUTS = (
    "parquet or .jsonl with prompt, images (a list) and relevance, scores or ranks; a folder with metadata.jsonl or "
    "parquet; or preference pairs"
)


def read_rankings(
    path: str | os.PathLike[str], *, split: str = "train", max_bad_fraction: float = 0.01
) -> tuple[list[Ranking], Counts]:
    """Read rankings, or pairs as rankings of two, from any layout in this module's table.

    A ranking whose pictures are all equally relevant carries no preference: it is dropped and counted as a tie. Where
    parquet files are named by split, only `split` is read.

    Raises:
        DataError: as `pairs.read_pairs`, and for a folder that holds both rankings and pairs.
    """
    files = find_files(Path(path), split, _LAYOUTS)
    ranked = [file for file in files if _lists_pictures(file)]
    if ranked and len(ranked) < len(files):
        other = next(file for file in files if file not in ranked)
        raise DataError(f"{path}: holds rankings ({ranked[0].name}) and pairs ({other.name}); name the file to read")
    rankings: list[Ranking] = []
    bad: list[BadRow] = []
    ties = 0
    for file in files:
        if not ranked:
            pairs: list[Pair] = []
            ties += (read_parquet if file.suffix == ".parquet" else read_jsonl)(file, pairs, bad)
            rankings += [Ranking(pair.id, pair.prompt, pair.pictures, (1.0, 0.0)) for pair in pairs]
        else:
            ties += _read(_parquet_rows(file) if file.suffix == ".parquet" else _jsonl_rows(file), rankings, bad)
    tie = "all pictures equally relevant" if ranked else "label_0 == 0.5"
    return rankings, tally(path, len(rankings), ties, bad, max_bad_fraction, "rankings", tie)


def _lists_pictures(file: Path) -> bool:
    if file.suffix == ".parquet":
        return "images" in readers.column_names(file)
    return any(isinstance(row, dict) and "images" in row for _, row in readers.jsonl_rows(file))


_Row = BadRow | tuple[str, Mapping[str, Any], list[Picture]]
"""A row that cannot be used, or its id, its values by name and its pictures."""


def _read(rows: Iterable[_Row], rankings: list[Ranking], bad: list[BadRow]) -> int:
    """Append the rankings and bad rows of one file; returns the number of ties."""
    ties = 0
    for entry in rows:
        if isinstance(entry, BadRow):
            bad.append(entry)
            continue
        where, row, pictures = entry
        prompt = row.get("prompt", row.get("caption"))
        fault = prompt_fault(prompt)
        relevance, scores = _relevance(row, len(pictures)) if fault is None else (fault, ())
        if isinstance(relevance, str):
            bad.append(BadRow(where, relevance))
        elif len(set(relevance)) == 1:
            ties += 1
        else:
            rankings.append(Ranking(where, prompt, tuple(pictures), relevance, scores))
    return ties


def _parquet_rows(file: Path) -> Iterable[_Row]:
    present = readers.column_names(file)
    text = "caption" if "caption" in present and "prompt" not in present else "prompt"
    named = [name for name in VALUES if name in present] or ["relevance"]
    readers.require_columns(file, present, [text, *named])
    for row, values in enumerate(readers.read_columns(file, [text, *named])):
        # How many pictures the cell lists is not known without reading them: they are counted when they are read.
        first = next((values[name] for name in named if isinstance(values[name], list)), [])
        of = len(first[0]) if first and isinstance(first[0], list) else len(first)
        yield f"{file.name}:{row}", values, [ParquetItem(file, row, "images", item, of) for item in range(of)]


def _jsonl_rows(file: Path) -> Iterable[_Row]:
    for number, row in readers.jsonl_rows(file):
        where = f"{file.name}:{number}"
        if isinstance(row, ValueError):
            yield BadRow(where, str(row))
        elif not isinstance(row, dict):
            yield BadRow(where, f"is a {type(row).__name__}, not an object with prompt, images and relevance")
        elif not isinstance(row.get("images"), list):
            keys = ", ".join(map(repr, list(row)[:8]))
            yield BadRow(where, f"is no ranking: a list 'images' is missing; it has {keys}")
        else:
            found = [find_picture(file.parent, name, f"images[{i}]") for i, name in enumerate(row["images"])]
            faults = [picture for picture in found if isinstance(picture, str)]
            pictures: list[Picture] = [picture for picture in found if isinstance(picture, Path)]
            yield BadRow(where, faults[0]) if faults else (where, row, pictures)


def _relevance(row: Mapping[str, Any], size: int) -> tuple[tuple[float, ...] | str, tuple[tuple[float, ...], ...]]:
    """A row's relevance [K], or why it has none, and its scores [M][K]."""
    lists: dict[str, list[Any]] = {}
    for name in VALUES:
        values = row.get(name)
        if values is not None and values != []:
            lists[name] = values if name == "scores" and isinstance(values, list) and _nested(values) else [values]
    if not lists:
        return f"says nothing of its pictures: give one of {', '.join(VALUES)}", ()
    for name, values in lists.items():
        fault = next((fault for one in values if (fault := _fault(name, one, size)) is not None), None)
        if fault is not None:
            return fault, ()
    scores = tuple(tuple(map(float, one)) for one in lists.get("scores", []))
    if "relevance" in lists:
        return tuple(map(float, lists["relevance"][0])), scores
    compared = scores or (tuple(-float(rank) for rank in lists["ranks"][0]),)
    shares = win_counts(torch.tensor(compared, dtype=torch.float64)[:, None])[0]
    return tuple(shares.tolist()), scores


def _nested(values: list[Any]) -> bool:
    return isinstance(values[0], list)


def _fault(name: str, values: Any, size: int) -> str | None:
    """Why these values cannot be one number for each of `size` pictures."""
    if not isinstance(values, list):
        return f"{name!r} is {type(values).__name__}, not a list of numbers"
    if size < 2:
        return f"ranks {size} picture{'s' * (size != 1)}: a ranking needs at least 2"
    if len(values) != size:
        return f"{name!r} has {len(values)} numbers for {size} pictures"
    low, high = (0, 1) if name == "relevance" else (-MOST, MOST)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return f"{name!r} holds {value!r:.40}, not a finite number{' from 0 to 1' if name == 'relevance' else ''}"
    return None


def write_rankings_parquet(path: str | os.PathLike[str], rankings: Iterable[Ranking], rows_per_group: int = 64) -> None:
    """Write rankings as parquet: prompt, images (a list of bytes), relevance [K], scores [M][K].

    Pictures are read a row group at a time, and the rankings may come from a generator, so a set of any size can be
    written. The file appears whole or not at all.
    """
    numbers = pa.list_(pa.float64())
    kinds = {"prompt": pa.string(), "images": pa.list_(pa.binary()), "relevance": numbers, "scores": pa.list_(numbers)}

    def groups() -> Iterable[dict[str, Any]]:
        rest = iter(rankings)
        while part := list(islice(rest, rows_per_group)):
            yield {
                "prompt": [ranking.prompt for ranking in part],
                "images": [[read_bytes(picture) for picture in ranking.pictures] for ranking in part],
                "relevance": [ranking.relevance for ranking in part],
                "scores": [ranking.scores for ranking in part],
            }

    write_groups(path, pa.schema(kinds), groups())
