"""PRDP: regress the difference of two trajectories' log-ratios on the difference of their rewards.

The target is the optimum of "reward minus beta KL", whose log-ratio is r / beta - log Z. Z depends only on the initial
noise, so it cancels in a pair that **shares x_T**, and the loss is 0 only at that optimum. It does not cancel in pairs
with different initial noise: their minimum is elsewhere, unless the result of a trajectory does not depend on its
start.

Everything is in nats summed over dims and steps, where beta is the weight of that KL. The paper's printed code averages
over the T steps (and, by its constants, over the D dims too). Its loss is the one here with converted constants:

    mean over T and D, with beta and clip   =   1 / (T D)^2  x  sum, with beta / (T D) and clip D

With those constants r / beta is 1e9 nats and more, where neighbouring float32 numbers are 64 apart, and a log-ratio is
below 1. The scalars here are therefore float64, on the CPU because not every device has float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import require_same_shape, widen
from .checks import require_positive


def prdp(log_ratio: Tensor, log_ratio_old: Tensor, reward: Tensor, beta: float, clip: float | None) -> Tensor:
    """PRDP's loss of each group, [G]: the mean over ordered pairs of its trajectories with r_i > r_j of max(l_ij,
    lc_ij).

        l_ij = (R_i - R_j - (r_i - r_j) / beta)^2,   R_i = sum over steps of log_ratio[i]

    and lc_ij the same with each step's log-ratio clamped to log_ratio_old +- clip. Deng et al. 2024, arXiv 2402.08714,
    eq. 10-21. `log_ratio` and `log_ratio_old` [G,K,T] in nats, of the policy and of the policy that drew the
    trajectories, each over the frozen reference; `reward` [G,K]. Only `log_ratio` takes a gradient. A step beyond the
    clip has none if it moved towards its target; if it moved away, it is pulled back. If the clip changes nothing, the
    gradient is that of l_ij.

    Ties are dropped, and a group without a preference gives 0. With clip None, a group without ties costs O(K): its
    loss is twice the unbiased variance of R - r / beta. Arithmetic is in float64 on the CPU; the loss is returned on
    the device of `log_ratio` in its dtype, float32 at least. Raises ValueError for shapes that do not fit, K < 2,
    beta <= 0 or clip <= 0.
    """
    require_positive(beta=beta)
    _require_groups(log_ratio, log_ratio_old)
    if reward.shape != log_ratio.shape[:2] or reward.shape[1] < 2:
        shapes = f"{list(reward.shape)} for {list(log_ratio.shape)}"
        raise ValueError(f"expected rewards [G,K], K >= 2, for log-ratios [G,K,T], got {shapes}")
    like = widen(log_ratio.detach()[:0])
    log_ratio, reward = _exact(log_ratio), _exact(reward.detach())
    target = (reward - reward.mean(1, keepdim=True)) / beta
    total = log_ratio.sum(2)
    residual = total - target
    if clip is not None:
        held = _held(log_ratio, log_ratio_old, clip).sum(2)
        plain, clipped = _gaps(residual), _gaps(held - target)
        # plain^2 >= clipped^2 as a product, whose first factor is not rounded to the target's precision. `maximum` of
        # the squares would also halve the gradient if both are equal.
        larger = (_gaps(total) - _gaps(held)).detach() * (plain + clipped).detach() >= 0
        # Values that are not finite take the plain branch, so that the loss is not finite.
        larger |= ~plain.isfinite()
        return _mean_over_pairs(torch.where(larger, plain, clipped).square(), reward).to(like)

    untied = (reward.sort(1).values.diff(dim=1) != 0).all(1)
    centred = residual[untied] - residual[untied].mean(1, keepdim=True)
    variance = centred.square().sum(1) / (reward.shape[1] - 1)
    loss = residual.new_zeros(len(residual)).masked_scatter(untied, 2 * variance)
    pairs = _mean_over_pairs(_gaps(residual[~untied]).square(), reward[~untied])
    return loss.masked_scatter(~untied, pairs).to(like)


@torch.no_grad()
def prdp_clip_fraction(log_ratio: Tensor, log_ratio_old: Tensor, clip: float) -> Tensor:
    """The fraction of each group's steps, [G], whose log-ratio is further than `clip` from the old one; for metrics.

    Such a step has a gradient only in the pairs where l_ij > lc_ij. Inputs [G,K,T], result and errors as in `prdp`.
    """
    _require_groups(log_ratio, log_ratio_old)
    now = _exact(log_ratio)
    return (_held(now, log_ratio_old, clip) != now).to(now.dtype).mean((1, 2)).to(widen(log_ratio[:0]))


def _require_groups(log_ratio: Tensor, log_ratio_old: Tensor) -> None:
    require_same_shape(log_ratio=log_ratio, log_ratio_old=log_ratio_old)
    if log_ratio.ndim != 3:
        raise ValueError(f"log-ratios must be [G,K,T], groups of trajectories of steps, got {list(log_ratio.shape)}")


def _exact(values: Tensor) -> Tensor:
    """The same numbers in float64, on the CPU first: the device may have no float64."""
    return values.cpu().to(torch.float64)


def _held(log_ratio: Tensor, log_ratio_old: Tensor, clip: float) -> Tensor:
    require_positive(clip=clip)
    old = _exact(log_ratio_old.detach())
    return log_ratio.clamp(old - clip, old + clip)


def _gaps(values: Tensor) -> Tensor:
    """[G,K] -> [G,K,K], the difference of each pair."""
    return values[:, :, None] - values[:, None, :]


def _mean_over_pairs(loss: Tensor, reward: Tensor) -> Tensor:
    """[G,K,K] -> [G], over the pairs with r_i > r_j; 0 without one."""
    preferred = (reward[:, :, None] > reward[:, None, :]).to(loss)
    return (loss * preferred).sum((1, 2)) / preferred.sum((1, 2)).clamp(min=1)
