"""Pictures as rewards see them: rounded to 8 bits, so that a picture scores the same in memory and as a saved PNG."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

Reward = Callable[[Tensor, list[str]], Tensor]
"""`(images [B,3,H,W] float in [0, 1], B prompts) -> [B]` float32."""


def to_uint8(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as 8-bit levels, rounded as a saved PNG is; what is out of range is clamped, NaN is black.

    Raises:
        ValueError: `images` is not floating point.
    """
    if not images.is_floating_point():
        raise ValueError(f"pictures are floating point in [0, 1], not {images.dtype}")
    # In float64, as in the PNG writer: in float32 a product can land on a half that the exact product misses. On the
    # CPU, as not every device has float64.
    levels = (images.detach().cpu().double().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.to(images.device)


def to_pil(levels: Tensor) -> list[Image.Image]:
    """8-bit levels [B,3,H,W] as pictures of Pillow."""
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def of_levels(score: Callable[[Tensor, list[str]], Tensor]) -> Reward:
    """A reward out of a function of 8-bit levels [B,3,H,W] uint8 and B prompts, with what all of them promise.

    No gradient, float32 whatever autocast surrounds it, the answer on the pictures' device, NaN for a picture that is
    not finite. Raises ValueError for shapes that do not fit together.
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
