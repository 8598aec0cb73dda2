"""Counts of a data set, in one pass that reads no picture."""

from collections import Counter
from dataclasses import dataclass, field

from diffusion_align.data.bad_rows import BadRow
from diffusion_align.data.pairs_and_rankings import is_tie, row_pairs
from diffusion_align.data.read import read_rows
from diffusion_align.data.rows.recognise import DataSource

_BAD_ROWS_SHOWN = 3


@dataclass
class DataSummary:
    """Counts of rows. rows == used + ties + broken; `pairs` are those that the used rows give.

    Attributes:
        sizes: how many of the used rows have K pictures, by K.
        weights: the least and the greatest weight of a used row.
        longest: characters of the longest prompt; empty: rows whose prompt is empty.
        bad: the first few of the bad rows.
    """

    rows: int = 0
    used: int = 0
    pairs: int = 0
    ties: int = 0
    broken: int = 0
    sizes: Counter[int] = field(default_factory=Counter)
    weights: tuple[float, float] | None = None
    longest: int = 0
    empty: int = 0
    bad: list[BadRow] = field(default_factory=list)


def summarise_data(source: DataSource) -> DataSummary:
    """Count every row of a source; raises DataError as `read_rows`."""
    found = DataSummary()
    compares = source.layout.compares
    for row in read_rows(source):
        found.rows += 1
        if isinstance(row, BadRow):
            found.broken += 1
            if len(found.bad) < _BAD_ROWS_SHOWN:
                found.bad.append(row)
            continue
        found.longest = max(found.longest, len(row.prompt))
        found.empty += not row.prompt.strip()
        if compares and is_tie(row):
            found.ties += 1
            continue
        found.used += 1
        found.pairs += len(row_pairs(row))
        found.sizes[len(row.pictures)] += 1
        if compares:
            low, high = found.weights or (row.weight, row.weight)
            found.weights = min(low, row.weight), max(high, row.weight)
    return found
