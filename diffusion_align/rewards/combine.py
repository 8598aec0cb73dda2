"""Several rewards as one number: a weighted sum, or the smallest; each standardised over its pictures first, or not.

Nothing here keeps a record: the same pictures give the same numbers, whatever was scored before. Where no weights are
wanted at all there is Pareto dominance, `objectives.pareto`, which needs the rewards apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .pictures import Reward


def weighted_sum(rewards: Sequence[Reward], weights: Sequence[float]) -> Reward:
    """`sum of w_i reward_i`; a picture that one of them cannot score is NaN.

    Raises:
        ValueError: not one finite weight for each reward, or none.
    """
    weighted = _weighted(rewards, weights)
    return lambda images, prompts: torch.stack([reward(images, prompts) for reward in weighted]).sum(0)


def smallest(rewards: Sequence[Reward], weights: Sequence[float]) -> Reward:
    """`min of w_i reward_i`: a picture is as good as its worst side. NaN, and errors, as in `weighted_sum`."""
    weighted = _weighted(rewards, weights)
    return lambda images, prompts: torch.stack([reward(images, prompts) for reward in weighted]).amin(0)


def standardised(reward: Reward) -> Reward:
    """A reward in standard deviations from its mean over the pictures of one call, whatever their prompts.

    In training a call is a `sample_chunk`, so the numbers say which of those pictures is better, and nothing across
    calls or runs. Equal scores give 0; a score that is not finite gives NaN and is left out of mean and deviation.
    """

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        given = reward(images, prompts)
        values = given.cpu().double()  # in this order: the device may have no float64
        finite = torch.isfinite(values)
        if not finite.any():
            return torch.full_like(given, torch.nan)
        known = values[finite]
        spread = known.std(correction=0)
        # Float32 scores that are equal but for rounding would otherwise become +-1.
        flat = spread <= 1e-6 * known.abs().amax()
        centred = (values - known.mean()) / torch.where(flat, torch.inf, spread)
        return torch.where(finite, centred, torch.nan).to(given.dtype).to(given.device)

    return score


def _weighted(rewards: Sequence[Reward], weights: Sequence[float]) -> list[Reward]:
    if not rewards or len(rewards) != len(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"{len(rewards)} rewards need as many finite weights, not {list(weights)}")

    def times(reward: Reward, weight: float) -> Reward:
        return lambda images, prompts: weight * reward(images, prompts)

    return [times(reward, weight) for reward, weight in zip(rewards, weights, strict=True)]
