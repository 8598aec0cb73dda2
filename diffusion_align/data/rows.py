"""The one row that every layout is read to, and the pairs and rankings that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffusion_align.data.layouts import Pair, Picture, Ranking


class RowError(ValueError):
    """A row that cannot be used; the message is the reason, without the row's id."""


@dataclass(frozen=True, slots=True)
class Row:
    """K pictures of one prompt and what is known of them.

    Attributes:
        id: file:row, or file:key.
        pictures: [K]; none of a prompt alone, one of a caption.
        relevance: [K] in [0, 1], higher is better; all equal is a tie. Empty where nobody said, as for captions.
        scores: [M][K], what M scorers said, where that was kept.
        weight: how much the preference counts, 1 where the layout does not say; 0 is a tie.
        source: the layout, or what the data itself names.
        models: [K] who made the pictures, or empty.
    """

    id: str
    prompt: str
    pictures: tuple[Picture, ...] = ()
    relevance: tuple[float, ...] = ()
    scores: tuple[tuple[float, ...], ...] = ()
    weight: float = 1.0
    source: str = ""
    models: tuple[str, ...] = ()


def is_tie(row: Row) -> bool:
    """Whether a row that compares pictures prefers none."""
    return row.weight == 0 or len(set(row.relevance)) < 2


def pairs_of(row: Row) -> list[Pair]:
    """Every two pictures of which one is more relevant, each with the row's weight; none of a tie.

    Of K > 2 pictures there are up to K (K - 1) / 2, named id[winner>loser].
    """
    if is_tie(row):
        return []
    phi, pictures = row.relevance, row.pictures
    ordered = [(i, j) for i in range(len(phi)) for j in range(len(phi)) if phi[i] > phi[j]]
    name = (lambda i, j: row.id) if len(phi) == 2 else (lambda i, j: f"{row.id}[{i}>{j}]")
    return [Pair(name(i, j), row.prompt, pictures[i], pictures[j], row.weight) for i, j in ordered]


def ties_of(row: Row) -> list[Pair]:
    """Every two pictures of which none is preferred, in the data's order; of a row of weight 0 all are."""
    phi, pictures = row.relevance, row.pictures
    places = [(i, j) for i in range(len(phi)) for j in range(i + 1, len(phi)) if row.weight == 0 or phi[i] == phi[j]]
    name = (lambda i, j: row.id) if len(phi) == 2 else (lambda i, j: f"{row.id}[{i}={j}]")
    return [Pair(name(i, j), row.prompt, pictures[i], pictures[j], tie=True) for i, j in places]


def ranking_of(row: Row) -> Ranking | None:
    """The row as a ranking; None for a tie.

    A ranking has no weight. Of two pictures it moves into the relevance: 1 and 0 with weight w become (1 + w) / 2 and
    (1 - w) / 2, so a vote of 70 to 30 (w = 0.4) is relevance 0.7 and 0.3. Of more pictures it is left out.
    """
    if is_tie(row):
        return None
    phi = row.relevance
    if len(phi) == 2 and row.weight < 1:
        middle, gap = (phi[0] + phi[1]) / 2, (phi[0] - phi[1]) / 2
        phi = (middle + row.weight * gap, middle - row.weight * gap)
    return Ranking(row.id, row.prompt, row.pictures, phi, row.scores)


def shares_won(scores: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The share of comparisons that each picture wins, scores [M][K] of M scorers -> [K]; a tie is nobody's win.

    It is `objectives.win_counts` of one prompt, without torch, which reading a table need not wait for.
    """
    size = len(scores[0])
    wins = [sum(one[i] > other for one in scores for other in one) for i in range(size)]
    return tuple(won / (len(scores) * (size - 1)) for won in wins)
