"""Losses of pairs of single reverse steps: D3PO and SPO. Elementwise: the caller weights and reduces steps.

A log-ratio here is log pi_theta - log pi_ref of one stored step, against the frozen reference and **in the unit of
beta**. The code of both papers averages over the dims of a latent, and their constants (beta 0.1 and 10, clip 0.1) are
for that: pass `log_ratio / dims`. Ties carry no preference; drop them before the network runs (see `selection`).
"""

from __future__ import annotations

import math

from torch import Tensor

from ..tensors import require_same_shape, widen
from .checks import require_positive, require_ratio_clip
from .preference import logistic, logistic_range


def _band(clip: float | None) -> tuple[float, float]:
    """The range to which `clip` clamps log-ratios."""
    if clip is None:
        return -math.inf, math.inf
    require_ratio_clip(clip)
    return math.log1p(-clip), math.log1p(clip)


def d3po(log_ratio_w: Tensor, log_ratio_l: Tensor, beta: float, clip: float | None) -> Tensor:
    """D3PO's loss of a step of the winning and of the losing trajectory, elementwise over equal shapes, [B] or [T,B].

        -log sigmoid(beta (q_w - q_l)),   q = log clamp(pi_theta / pi_ref, 1 - clip, 1 + clip)

    Yang et al. 2023, arXiv 2311.13231, eq. 14; the clamp is from the authors' code. Each side is clamped separately and
    has no gradient while clamped, so the loser is still pushed when the winner is clamped: log `clamped`. `clip` None:
    eq. 14 as printed. Raises ValueError for unequal shapes, beta <= 0, or clip outside (0, 1).
    """
    require_same_shape(log_ratio_w=log_ratio_w, log_ratio_l=log_ratio_l)
    low, high = _band(clip)
    # Logarithms are clamped, because the ratio can overflow, and inf times a gradient of 0 is nan.
    return logistic(widen(log_ratio_w).clamp(low, high) - widen(log_ratio_l).clamp(low, high), beta)


def spo(log_ratio_w: Tensor, log_ratio_l: Tensor, beta: float, clip: float | None) -> Tensor:
    """SPO's loss of two children of one parent state, elementwise (Liang et al. 2024, arXiv 2406.04314, eq. 5).

    The formula and errors of `d3po`; the pairs differ, and a larger beta makes the loss nonlinear in the log-ratios.
    The two children share one Gaussian per policy, so one call of each network serves both sides.
    """
    return d3po(log_ratio_w, log_ratio_l, beta, clip)


def clamped(log_ratio: Tensor, clip: float | None) -> Tensor:
    """Whether `d3po` and `spo` clamp a side, which then has no gradient: bool of the same shape; log its mean."""
    low, high = _band(clip)
    value = widen(log_ratio)
    return (value < low) | (value > high)


def stepwise_range(beta: float, clip: float | None) -> tuple[float, float]:
    """The least and greatest value of `d3po` and `spo`: 0.683 and 0.703 at D3PO's constants.

    So a loss near log 2 does not mean that nothing is learned.
    """
    low, high = _band(clip)
    if clip is None:
        require_positive(beta=beta)
        return 0.0, math.inf
    return logistic_range(low - high, high - low, beta)
