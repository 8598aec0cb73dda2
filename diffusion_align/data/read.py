"""From a path to rows, pairs and rankings: its layout is recognised without a flag, by names and columns.

No picture is read here. Rows that cannot be used are counted with their reason; pictures that cannot be read are found
when the cache is built, or by `data check`.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from diffusion_align.data.bad_rows import BadRow, Counts, require_usable
from diffusion_align.data.pairs_and_rankings import DataRow, Pair, Ranking, row_pairs, row_ranking, row_ties
from diffusion_align.data.rows.archives import tar_rows
from diffusion_align.data.rows.archives.zip_rows import zip_rows
from diffusion_align.data.rows.interpret import grouped_by_prompt
from diffusion_align.data.rows.known_layouts import CAPTIONS, IMAGE_REWARD_DB
from diffusion_align.data.rows.raw_rows import RawRow, RowError
from diffusion_align.data.rows.recognise import DataSource, is_picture, recognise_preferences
from diffusion_align.data.rows.tables import table_rows
from diffusion_align.data.rows.tables.text import PLAIN, ReadOptions, TextFile, kind_of
from diffusion_align.data.rows.two_folders import two_folder_rows

_PAIRS = (
    "parquet with jpg_0, jpg_1, label_0, label_1, caption (or prompt, chosen, rejected); a folder with metadata.jsonl; "
    "a .jsonl with prompt, chosen, rejected; or another layout that `data inspect` knows"
)
_RANKINGS = (
    "parquet or .jsonl with prompt, images (a list) and relevance, scores or ranks; a folder with metadata.jsonl or "
    "parquet; preference pairs; or another layout that `data inspect` knows"
)
T = TypeVar("T")


def read_pairs(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    max_bad_fraction: float = 0.01,
    keep_ties: bool = False,
    options: ReadOptions = PLAIN,
) -> tuple[list[Pair], Counts]:
    """Read preference pairs from any layout that compares pictures.

    A tie carries no preference: it is dropped and counted, never taken as a win. With `keep_ties` it is a pair whose
    `tie` is true, for methods that can learn from it. A ranking gives a pair for every two pictures of different
    relevance. Where files are named by split (train-00000-of-00002.parquet), only `split` is read, so that a test split
    never slips into training. `options` say what files do not tell: the encoding of texts, other names of columns.

    Raises:
        DataError: unknown layout, missing column, a path outside the data's folder, nothing left, only ties, no
            preference at all, or more than `max_bad_fraction` of the rows bad. The message is one line with the
            file, the row or key, and the cure.
    """
    source = recognise_preferences(path, split, _PAIRS, options)
    return _read(source, "pairs", lambda row: row_pairs(row) + (row_ties(row) if keep_ties else []), max_bad_fraction)


def read_rankings(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    max_bad_fraction: float = 0.01,
    options: ReadOptions = PLAIN,
) -> tuple[list[Ranking], Counts]:
    """Read rankings, or pairs as rankings of two, from any layout that compares pictures.

    A ranking whose pictures are all equally relevant carries no preference: it is dropped and counted as a tie. Where
    files are named by split, only `split` is read.

    Raises:
        DataError: as `read_pairs`, and for a folder that holds both rankings and pairs.
    """
    source = recognise_preferences(path, split, _RANKINGS, options)
    return _read(source, "rankings", lambda row: list(filter(None, [row_ranking(row)])), max_bad_fraction)


def _read(
    source: DataSource, what: str, found_in: Callable[[DataRow], list[T]], max_bad_fraction: float
) -> tuple[list[T], Counts]:
    found: list[T] = []
    bad: list[BadRow] = []
    ties = count = 0
    for row in read_rows(source):
        count += 1
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            several = found_in(row)
            ties += not several
            found += several
    counts = Counts(count, len(found), ties, len(bad), tuple(bad), what)
    require_usable(str(source.path), counts, source.layout.tie, max_bad_fraction)
    return found, counts


def read_rows(source: DataSource) -> Iterator[DataRow | BadRow]:
    """Every row, one at a time, in the order of the files: what can be used, and what cannot with the reason.

    Raises:
        DataError: a damaged file, or a path that leads out of the data's folder.
    """
    for raw in _raw_rows(source):
        if isinstance(raw, BadRow):
            yield raw
            continue
        try:
            row = source.layout.to_row(raw)
        except RowError as error:
            yield BadRow(raw.id, str(error))
        else:
            yield row if row.source else replace(row, source=source.layout.name)


def _raw_rows(source: DataSource) -> Iterator[BadRow | RawRow]:
    options = source.options
    if source.folders is not None:
        yield from two_folder_rows(source.folders, options)
        return
    if source.layout is CAPTIONS and source.path.is_dir() and is_picture(source.files[0]):
        for number, file in enumerate(source.files):
            assert isinstance(file, Path)  # a folder's
            yield table_rows.captioned_picture(source.path, number, file, options.encoding)
        return
    for file in source.files:
        kind = kind_of(file)
        if isinstance(file, Path) and kind == ".tar":
            yield from tar_rows.tar_rows(file, source.layout, source.unread, options.encoding)
        elif isinstance(file, Path) and kind == ".zip":
            yield from zip_rows(file, source.layout, source.unread, options.encoding)
        elif kind == ".txt":
            yield from table_rows.prompt_lines(file, options.encoding)
        else:
            found = table_rows.table_rows(file, source.layout, _near(file), options)
            yield from grouped_by_prompt(found) if source.layout is IMAGE_REWARD_DB else found


def _near(file: TextFile) -> tuple[str, ...]:
    """Where pictures of a list may lie: beside it, or in a folder of the split's name, as HPDv2 has it."""
    splits = ("train", "test")
    return ("", *(name for name in splits if not isinstance(file, Path) or (file.parent / name).is_dir()))
