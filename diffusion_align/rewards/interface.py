"""The interface of every reward, `(images [B,3,H,W] in [0, 1], B prompts) -> [B]`, and several rewards as one.

A reward sees pictures rounded to 8 bits, so that a picture scores the same in memory and as a saved PNG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Reward = Callable[[Tensor, list[str]], Tensor]
"""`(images [B,3,H,W] float in [0, 1], B prompts) -> [B]` float32."""


class RewardError(ValueError):
    """A reward failed, or did not return one number for each picture."""


def one_each(values: Any, count: int, name: str) -> Tensor:
    """What reward `name` returned for `count` pictures: [count] float32 on the CPU without gradient.

    Raises RewardError for anything but a tensor [count].
    """
    if not isinstance(values, Tensor) or tuple(values.shape) != (count,):
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(f"{name} returned {found} for {count} pictures: expected [{count}], one number each")
    return values.detach().float().cpu()


def device_or_default(device: str | torch.device | None) -> torch.device:
    """The given device; by default a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def to_uint8(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as 8-bit levels, rounded as in a saved PNG; values out of range are clamped, NaN is black.

    Raises:
        ValueError: `images` is not floating point.
    """
    if not images.is_floating_point():
        raise ValueError(f"pictures are floating point in [0, 1], not {images.dtype}")
    # float64 as in the PNG writer: a product in float32 can land on a half that the exact product misses. On the CPU:
    # not every device has float64.
    levels = (images.detach().cpu().double().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.to(images.device)


def to_pil(levels: Tensor) -> list[Image.Image]:
    """8-bit levels [B,3,H,W] as pictures of Pillow."""
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def of_levels(score: Callable[[Tensor, list[str]], Tensor]) -> Reward:
    """A reward made of a function of 8-bit levels [B,3,H,W] uint8 and B prompts.

    The reward gives no gradient, computes in float32 under any autocast, answers on the pictures' device, and gives NaN
    for a picture that is not finite. It raises ValueError for shapes that do not fit together.
    """

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or len(prompts) != len(images):
            raise ValueError(f"expected [B,3,H,W] and B prompts, not {list(images.shape)} and {len(prompts)} prompts")
        if not prompts:
            return torch.zeros(0, device=images.device)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            scores = score(to_uint8(images), prompts).float().to(images.device)
        return torch.where(torch.isfinite(images).flatten(1).all(1), scores, torch.nan)

    return reward


def weighted_sum(rewards: Sequence[Reward], weights: Sequence[float]) -> Reward:
    """`sum of w_i reward_i`; NaN for a picture that one of them cannot score.

    Raises:
        ValueError: not one finite weight for each reward, or no reward.
    """
    weighted = _weighted(rewards, weights)
    return lambda images, prompts: torch.stack([reward(images, prompts) for reward in weighted]).sum(0)


def smallest(rewards: Sequence[Reward], weights: Sequence[float]) -> Reward:
    """`min of w_i reward_i`; NaN and errors as in `weighted_sum`."""
    weighted = _weighted(rewards, weights)
    return lambda images, prompts: torch.stack([reward(images, prompts) for reward in weighted]).amin(0)


def _weighted(rewards: Sequence[Reward], weights: Sequence[float]) -> list[Reward]:
    if not rewards or len(rewards) != len(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"{len(rewards)} rewards need as many finite weights, not {list(weights)}")

    def times(reward: Reward, weight: float) -> Reward:
        return lambda images, prompts: weight * reward(images, prompts)

    return [times(reward, weight) for reward, weight in zip(rewards, weights, strict=True)]


def standardised(reward: Reward) -> Reward:
    """A reward in standard deviations from its mean over the pictures of one call, for all prompts together.

    In training a call scores a `sample_chunk`, so the numbers compare the pictures of one chunk and nothing across
    chunks or runs. Equal scores give 0; a score that is not finite gives NaN and is left out of mean and deviation.
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
