"""From rewards to pairs, labels and relevance, without gradients or random numbers.

Higher is better. Equal scores are no preference, and no tie is broken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import require_same_shape, widen


@torch.no_grad()
def best_and_worst(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the best and of the worst of each group, scores [G,K] -> w [G], l [G], and `decided` [G] bool.

    `decided` is False if all are equal or one is nan: leave that group out. Of several best the first is taken.
    Raises ValueError unless scores are [G,K] with K >= 2.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must be [G,K] with K >= 2, got {list(scores.shape)}")
    return scores.argmax(1), scores.argmin(1), scores.amax(1) > scores.amin(1)


@torch.no_grad()
def ordered_pairs(scores: Tensor) -> tuple[Tensor, ...]:
    """All pairs with a preference, as index tensors [P]: scores [K] -> (w, l), scores [G,K] -> (group, w, l).

    scores[group, w] > scores[group, l] for each; ties are left out. In the order of group, then w, then l. Raises
    ValueError for other shapes.
    """
    if scores.ndim not in (1, 2):
        raise ValueError(f"scores must be [K] or [G,K], got {list(scores.shape)}")
    return (scores[..., :, None] > scores[..., None, :]).nonzero(as_tuple=True)


@torch.no_grad()
def softmax_gap(score_w: Tensor, score_l: Tensor) -> Tensor:
    """p_w - p_l of the softmax of two scores, which is tanh((score_w - score_l) / 2); elementwise over equal shapes."""
    require_same_shape(score_w=score_w, score_l=score_l)
    return torch.tanh((widen(score_w) - widen(score_l)) / 2)


@torch.no_grad()
def clear_win(score_w: Tensor, score_l: Tensor, threshold: float) -> Tensor:
    """Whether SPO keeps the pair: `softmax_gap` above `threshold`, elementwise bool (arXiv 2406.04314, authors' code).

    Scores are a preference model's logits, so 0.3 is a gap of 0.619. Raises ValueError for a threshold outside [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"the threshold, a difference of probabilities, must lie in [0, 1), got {threshold}")
    return softmax_gap(score_w, score_l) > threshold


@torch.no_grad()
def pareto(first: Tensor, second: Tensor) -> Tensor:
    """Which of two sides dominates in M rewards, [M,...] each -> [...] int64: 1 the first, -1 the second, 0 neither.

    A side dominates when it is nowhere worse and somewhere better (the preference of D3PO under several rewards).
    """
    require_same_shape(first=first, second=second)
    if first.ndim < 1 or first.shape[0] < 1:
        raise ValueError(f"expected rewards [M,...] with M >= 1, got {list(first.shape)}")
    wins = (first >= second).all(0) & (first > second).any(0)
    losses = (first <= second).all(0) & (first < second).any(0)
    return wins.to(torch.int64) - losses.to(torch.int64)


@torch.no_grad()
def win_counts(rewards: Tensor) -> Tensor:
    """RankDPO's relevance, the fraction of comparisons that a picture wins: [M,G,K] of M rewards -> [G,K] in [0, 1].

        phi_i = #{(m, j != i): r_m(i) > r_m(j)} / (M (K - 1))

    Karthik et al. 2024, arXiv 2410.18013, alg. 1. A tie counts as no win. Scores of different rewards are not compared,
    so they need no common scale. Raises ValueError unless rewards are [M,G,K] with K >= 2.
    """
    if rewards.ndim != 3 or rewards.shape[0] < 1 or rewards.shape[2] < 2:
        raise ValueError(f"rewards must be [M,G,K] with M >= 1 and K >= 2, got {list(rewards.shape)}")
    wins = widen(rewards)[:, :, :, None] > widen(rewards)[:, :, None, :]
    scorers, _, size = rewards.shape
    return wins.sum((0, 3)).to(widen(rewards)) / (scorers * (size - 1))
