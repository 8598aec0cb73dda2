"""Rankings: K pictures of one prompt and how good each is, from every layout that compares pictures (`formats`).

`relevance` [K] is phi of RankDPO, in [0, 1], higher is better. Where a layout has scores or ranks in its place, it is
the share of comparisons that each picture wins. A pair is a ranking of two, with relevance 1 and 0, or nearer to each
other where the pair has a weight below 1. No picture is read here, and rows that cannot make a ranking are counted with
their reason, as for pairs.
"""

import os
from collections.abc import Iterable
from itertools import islice
from typing import Any

import pyarrow as pa

from diffusion_align.data.layouts import Ranking, read_bytes
from diffusion_align.data.pairs_and_rankings import Counts, comparing, tally, write_groups
from diffusion_align.data.raw_rows import BadRow
from diffusion_align.data.read import rows
from diffusion_align.data.rows import ranking_of

__all__ = ["Ranking", "read_rankings", "write_rankings_parquet"]

_LAYOUTS = (
    "parquet or .jsonl with prompt, images (a list) and relevance, scores or ranks; a folder with metadata.jsonl or "
    "parquet; preference pairs; or another layout that `data inspect` knows"
)


def read_rankings(
    path: str | os.PathLike[str], *, split: str = "train", max_bad_fraction: float = 0.01
) -> tuple[list[Ranking], Counts]:
    """Read rankings, or pairs as rankings of two, from any layout that compares pictures.

    A ranking whose pictures are all equally relevant carries no preference: it is dropped and counted as a tie. Where
    files are named by split, only `split` is read.

    Raises:
        DataError: as `pairs.read_pairs`, and for a folder that holds both rankings and pairs.
    """
    source = comparing(path, split, _LAYOUTS)
    rankings: list[Ranking] = []
    bad: list[BadRow] = []
    ties = count = 0
    for entry in rows(source):
        count += 1
        if isinstance(entry, BadRow):
            bad.append(entry)
        elif (ranking := ranking_of(entry)) is not None:
            rankings.append(ranking)
        else:
            ties += 1
    return rankings, tally(path, count, len(rankings), ties, bad, max_bad_fraction, "rankings", source.format.tie)


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
