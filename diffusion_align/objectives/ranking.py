"""RankDPO: all pairs of a ranking, weighted by how much the ranking's DCG changes if the two are swapped."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_align.vocabulary import DISCOUNTS, PAIR_NORMS

from ..tensors import require_same_shape, widen
from .preference import logistic

LOGARITHMS = {"ln": torch.log, "log2": torch.log2}


@torch.no_grad()
def gain_weights(relevance: Tensor, discount: str = "ln") -> Tensor:
    """The weight of each pair of a ranking: relevance phi [B,K], higher is better -> [B,K,K], symmetric, no gradient.

        Delta_ij = |2^phi_i - 2^phi_j| |1/D(tau_i) - 1/D(tau_j)|,   D(tau) = log(1 + tau)

    Karthik et al. 2024, arXiv 2410.18013, eq. 5-6. tau is the rank by phi, 1 the best; equal phi are ranked by index,
    and their pairs have weight 0. The paper does not specify its logarithm: "ln" here, "log2" as in DCG (all weights
    times ln 2). Raises ValueError unless relevance is [B,K] and the discount is known.
    """
    if discount not in DISCOUNTS:
        raise ValueError(f"unknown discount {discount!r}: expected one of {', '.join(DISCOUNTS)}")
    if relevance.ndim != 2:
        raise ValueError(f"relevance must be [B,K], got {list(relevance.shape)}")
    relevance = widen(relevance)
    order = relevance.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1) + 1  # the inverse of a permutation is its argsort
    keep = 1 / LOGARITHMS[discount](1 + rank.to(relevance))
    gain = relevance.exp2()  # the "- 1" of the gain cancels in the difference
    return (gain[:, :, None] - gain[:, None, :]).abs() * (keep[:, :, None] - keep[:, None, :]).abs()


def rank_dpo(scores: Tensor, relevance: Tensor, beta: float, *, pair_norm: str = "sum", discount: str = "ln") -> Tensor:
    """RankDPO's loss of each ranking of K pictures of one prompt, [B].

        - sum over pairs with i preferred to j of Delta_ij log sigmoid(beta (score_i - score_j))

    Karthik et al. 2024, arXiv 2410.18013, eq. 7. `scores` [B,K], higher is better: reference minus policy squared
    errors at one timestep per ranking (**minus** the paper's s), or log-ratios. beta is in the unit 1/score.
    `relevance` phi [B,K], higher is better; it takes no gradient, and i is preferred to j when phi_i > phi_j.

    `pair_norm`: "sum" (the paper), "sum_weights" (a mean weighted by Delta) or "num_pairs" (over the pairs with a
    preference). A ranking without a preference gives 0. Raises ValueError unless both are [B,K], and for beta <= 0 or
    an unknown name.
    """
    if pair_norm not in PAIR_NORMS:
        raise ValueError(f"unknown pair_norm {pair_norm!r}: expected one of {', '.join(PAIR_NORMS)}")
    require_same_shape(scores=scores, relevance=relevance)
    weights = gain_weights(relevance, discount) * (relevance[:, :, None] > relevance[:, None, :])
    # [b,i,j]: the margin of i over j, where i is preferred.
    loss = (weights * logistic(scores[:, :, None] - scores[:, None, :], beta)).sum((1, 2))
    if pair_norm == "sum":
        return loss
    total = (weights if pair_norm == "sum_weights" else weights.sign()).sum((1, 2))
    return loss / torch.where(total > 0, total, 1)
