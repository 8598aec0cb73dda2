"""From scores to relevance, and to figures of how far the rewards can be trusted.

Scores are [M,P,K]: M rewards, P prompts, K pictures of each; NaN where a reward failed. Higher is better.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.data.pairs_and_rankings import Ranking, write_pairs_parquet
from diffusion_align.objectives import win_counts


def relevances(scores: Tensor) -> Iterator[tuple[list[int], list[float]]]:
    """For each prompt, the places of the pictures that every reward scored, and their relevance.

    It is the fraction of comparisons won (Karthik et al. 2024, arXiv 2410.18013, alg. 1), over those pictures alone;
    empty if fewer than two are left. Without rewards (M = 0) the places themselves are ranked, for labels by chance.
    """
    for number in range(scores.shape[1]):
        given = scores[:, number]
        places = given.isfinite().all(0).nonzero()[:, 0].tolist()
        if len(places) < 2:
            yield places, []
        elif len(given):
            yield places, win_counts(given[:, None, places])[0].tolist()
        else:
            yield places, [1 - place / (len(places) - 1) for place in places]


def shuffled_relevance(relevance: list[float], seed: int, prompt: str) -> list[float]:
    """The same relevances in random order, drawn at (seed, "random labels", prompt)."""
    return [relevance[place] for place in rng.permutation(len(relevance), seed, "random labels", prompt).tolist()]


def write_best_and_worst(path: str | os.PathLike[str], rankings: Sequence[Ranking], seed: int) -> None:
    """The most and the least relevant picture of each prompt as a pair, in Pick-a-Pic's layout."""
    # Which side won is drawn, so that a reader which ignores the label cannot look right.
    best_first = rng.integers_batch(0, 2, seed, "side", [ranking.prompt for ranking in rankings]).tolist()
    sides = []
    for ranking, best_comes_first in zip(rankings, best_first, strict=True):
        phi = ranking.relevance
        ends = phi.index(max(phi)), phi.index(min(phi))
        sides.append(ends if best_comes_first else ends[::-1])
    chosen = list(zip(rankings, sides, strict=True))
    left, right = ([ranking.pictures[places[side]] for ranking, places in chosen] for side in (0, 1))
    extra = {f"relevance_{side}": [ranking.relevance[places[side]] for ranking, places in chosen] for side in (0, 1)}
    write_pairs_parquet(path, [ranking.prompt for ranking in rankings], left, right, best_first, extra)


def decided_fraction(rankings: Sequence[Ranking]) -> float:
    """Of all pairs of pictures of one prompt, the fraction in which one picture is more relevant."""
    lists = [torch.tensor(ranking.relevance) for ranking in rankings]
    told = sum(int((phi[:, None] > phi).sum()) for phi in lists)
    return told / sum(len(phi) * (len(phi) - 1) // 2 for phi in lists)


def scorer_figures(scores: Tensor, names: list[str]) -> dict[str, Any]:
    """For each reward: pictures without a score, mean and standard deviation, and the fraction of pairs that it
    tells apart."""
    _, decides = _orders(scores)
    figures = {}
    for name, given, told in zip(names, scores, decides, strict=True):
        good = given[given.isfinite()]
        pairs = _pairs(given.isfinite()).sum()
        figures[name] = {
            "failed": int((~given.isfinite()).sum()),
            "mean": float(good.mean()),
            "std": float(good.std(correction=0)),
            "decides": _fraction(told.sum(), pairs),
        }
    return figures


def agreement(scores: Tensor, names: list[str]) -> dict[str, Any]:
    """For every two rewards: how many pairs of pictures of one prompt both tell apart, and the fraction of these in
    which they agree."""
    signs, decides = _orders(scores)
    figures = {}
    for a in range(len(names)):
        for b in range(a + 1, len(names)):
            both = decides[a] & decides[b]
            agree = both & (signs[a] == signs[b])
            figures[f"{names[a]} / {names[b]}"] = {
                "pairs": int(both.sum()),
                "agree": _fraction(agree.sum(), both.sum()),
            }
    return figures


def _orders(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pair of pictures of a prompt, [M,P,pairs]: the sign of the difference, and whether there is one."""
    i, j = torch.triu_indices(scores.shape[2], scores.shape[2], 1)
    signs = (scores[..., i] - scores[..., j]).sign()
    return signs, signs.abs() == 1


def _pairs(finite: Tensor) -> Tensor:
    """[P,K] -> [P,pairs]: whether both have a number."""
    i, j = torch.triu_indices(finite.shape[1], finite.shape[1], 1)
    return finite[:, i] & finite[:, j]


def _fraction(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole else None
