"""Losses of preference pairs as functions of a margin, one number per example; the caller reduces.

A **margin** is the winner's score minus the loser's, each relative to the reference; 0 if policy and reference agree.
`beta` turns it into a logit, so its unit is one over the margin's. It has no default, because it depends on the run.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_align.vocabulary import BETA_CONVENTIONS

from ..tensors import require_same_shape, widen
from .checks import require_positive


def diffusion_dpo_margin(err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor) -> Tensor:
    """The margin of Diffusion-DPO: by how much more than the reference the policy prefers the winner, [B].

        -((err_w - ref_err_w) - (err_l - ref_err_l))

    Wallace et al. 2023, arXiv 2311.12908, eq. 14, before beta T omega. Errors [B] are squared errors of
    policy and reference at the same noise and timestep; the margin has their unit (summed over dims here) and no factor
    1/2. Raises ValueError unless all four are [B]: [B] and [B,1] would broadcast, unnoticed while the margin is 0.
    """
    require_same_shape(err_w=err_w, err_l=err_l, ref_err_w=ref_err_w, ref_err_l=ref_err_l)
    if err_w.ndim != 1:
        raise ValueError(f"errors must be [B], got {list(err_w.shape)}: sum them over dims first")
    return (widen(err_l) - widen(ref_err_l)) - (widen(err_w) - widen(ref_err_w))


def beta_per_squared_error(beta: float, dims: int, convention: str) -> float:
    """A published beta of Diffusion-DPO as the coefficient of a squared-error margin that is summed over `dims`.

    "salesforce", the authors' code:      beta / (2 dims)   errors averaged over dims, and a 1/2
    "diffusers", its training script:     beta / dims       errors averaged over dims
    "sum", eq. 14 with T omega inside:    beta

    So 5000 in the first is 2500 in the second. This function is the only place with that 1/2.
    """
    require_positive(beta=beta)
    if dims < 1:
        raise ValueError(f"dims must be at least 1, got {dims}")
    if convention not in BETA_CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}: expected one of {', '.join(BETA_CONVENTIONS)}")
    return {"salesforce": beta / (2 * dims), "diffusers": beta / dims, "sum": beta}[convention]


def _require_flip_rate(q: float) -> None:
    if not 0 <= q < 0.5:
        raise ValueError(f"the fraction of flipped labels must lie in [0, 0.5), got {q}")


def logistic(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss, -log sigmoid(beta margin), elementwise (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    With `label_smoothing` q it is cDPO, -(1-q) log sigmoid(z) - q log sigmoid(-z), minimal at z = log((1-q)/q)
    (E. Mitchell 2023, "A note on DPO with noisy preferences"). Raises ValueError for beta <= 0 or q outside [0, 0.5).
    """
    require_positive(beta=beta)
    _require_flip_rate(label_smoothing)
    logit = beta * widen(margin)
    # log sigmoid(-z) = log sigmoid(z) - z combines the two terms without overflow.
    return label_smoothing * logit - F.logsigmoid(logit)


def robust(margin: Tensor, beta: float, flip: float) -> Tensor:
    """DPO's loss, unbiased if a fraction `flip` of the labels is wrong, elementwise (Chowdhury et al. 2024, arXiv
    2403.00409).

        [-(1-flip) log sigmoid(z) + flip log sigmoid(-z)] / (1 - 2 flip)

    It has no lower bound: at large z it falls like -flip z / (1 - 2 flip). Raises ValueError as `logistic`.
    """
    require_positive(beta=beta)
    _require_flip_rate(flip)
    logit = beta * widen(margin)
    return -F.logsigmoid(logit) - flip / (1 - 2 * flip) * logit


def hinge(margin: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta margin), elementwise (SLiC, Zhao et al. 2023, arXiv 2305.10425; with a reference, 2309.06657)."""
    require_positive(beta=beta)
    return torch.relu(1 - beta * widen(margin))


def ipo(margin: Tensor, beta: float) -> Tensor:
    """(margin - 1/(2 beta))^2, elementwise (Azar et al. 2023, arXiv 2310.12036, eq. 17, beta their tau).

    The target 1/(2 beta) has the margin's unit, so a beta tuned on per-dim means is not one for sums.
    """
    require_positive(beta=beta)
    return (widen(margin) - 1 / (2 * beta)).square()


def implicit_accuracy(margin: Tensor) -> Tensor:
    """Whether the policy, against the reference, ranks the pair as labelled: 1, 0, or 0.5 for a tie; no gradient."""
    margin = widen(margin.detach())
    return torch.heaviside(margin, margin.new_tensor(0.5))


def logistic_range(lowest: float, highest: float, beta: float, label_smoothing: float = 0.0) -> tuple[float, float]:
    """The least and greatest value of `logistic` for margins clamped to [lowest, highest].

    A loss at the lower end has no gradient. With smoothing the minimum may lie inside the interval.
    """
    if not lowest <= highest:
        raise ValueError(f"expected lowest <= highest, got {lowest} and {highest}")
    points = [lowest, highest]
    if label_smoothing > 0:
        points.append(min(max(math.log((1 - label_smoothing) / label_smoothing) / beta, lowest), highest))
    values = logistic(torch.tensor(points, dtype=torch.float64), beta, label_smoothing).tolist()
    return min(values), max(values)
