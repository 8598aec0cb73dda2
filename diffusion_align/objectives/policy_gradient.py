"""Policy gradient: the clipped surrogate of DDPO and Flow-GRPO, and advantages within a group of one prompt's runs.

The KL penalty is separate: add `kl_weight * step.kl(reference_step)` per step, which is exact for the Gaussians of a
sampler.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tensors import require_same_shape, widen
from .checks import require_positive, require_ratio_clip

SPREADS = ("group", "global", "none")


def ppo_clip(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate of a reverse step, as a loss, elementwise over equal shapes, [B] or [T,B].

        max(-A rho, -A clamp(rho, 1 - clip, 1 + clip)),   rho = exp(log_ratio)

    Schulman et al. 2017, arXiv 1707.06347, eq. 7, per reverse step as in DDPO (Black et al. 2023, arXiv 2305.13301).
    `log_ratio` is log pi_theta - log pi_old of a stored step, **in the unit of clip**: the published clip of 1e-4 is
    for means over dims, so pass `log_ratio / dims` with it. The advantage takes no gradient. Raises ValueError for
    unequal shapes or clip outside (0, 1).

    A good step whose ratio is above the clip range has no gradient, and neither has a bad step below it. The loss of a
    bad step that became more likely is unbounded: it is inf beyond a log-ratio of 88 in float32.
    """
    require_same_shape(log_ratio=log_ratio, advantage=advantage)
    require_ratio_clip(clip)
    log_ratio = widen(log_ratio)
    advantage = advantage.detach().to(log_ratio)
    # The sign of A decides which end of the clip range applies, so the logarithm is clamped before exp can overflow.
    bounded = torch.where(advantage >= 0, log_ratio.clamp(max=math.log1p(clip)), log_ratio.clamp(min=math.log1p(-clip)))
    return -advantage * bounded.exp()


@torch.no_grad()
def group_advantage(reward: Tensor, std: str = "group", eps: float = 1e-6, *, leave_one_out: bool = False) -> Tensor:
    """Rewards [G,K] of K trajectories of each of G prompts, centred in their group and scaled -> advantages [G,K].

    `std`: divide by the standard deviation of the "group" (GRPO, Shao et al. 2024, arXiv 2402.03300) or of all rewards,
    "global"; both population ones, plus `eps`; or "none". `leave_one_out` takes the mean of the other K - 1 as baseline
    (RLOO, Kool et al. 2019), which does not depend on the trajectory's own reward; it is K / (K - 1) times the centred
    reward. A group without spread gives 0. Raises ValueError unless rewards are [G,K] with K >= 2, and for an unknown
    `std`.
    """
    if std not in SPREADS:
        raise ValueError(f"unknown std {std!r}: expected one of {', '.join(SPREADS)}")
    require_positive(eps=eps)
    if reward.ndim != 2 or reward.shape[1] < 2:
        raise ValueError(f"rewards must be [G,K] with K >= 2, got {list(reward.shape)}")
    reward = widen(reward)
    size = reward.shape[1]
    advantage = (reward - reward.mean(1, keepdim=True)) * (size / (size - 1) if leave_one_out else 1)
    if std == "group":
        advantage = advantage / (reward.std(1, correction=0, keepdim=True) + eps)
    elif std == "global":
        advantage = advantage / (reward.std(correction=0) + eps)
    # For equal rewards, the rounding error of their mean divided by eps would look like a preference.
    return advantage.masked_fill((reward == reward[:, :1]).all(1, keepdim=True), 0)
