"""Rewards without a network: the size of a picture's JPEG, the embedded world's judge, random numbers."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.shapes import ATTRIBUTES, judge

from .interface import Reward, of_levels, to_pil

JPEG_QUALITY = 95


def jpeg_scorer(sign: float) -> Reward:
    """`sign` times the kB (1000 bytes) of each picture's JPEG: -1 rewards plain pictures, 1 rewards busy ones.

    These are DDPO's compressibility and incompressibility (Black et al. 2023, arXiv 2305.13301). They need no weights
    and show within minutes whether a method learns.
    """

    def score(levels: Tensor, prompts: list[str]) -> Tensor:
        sizes = []
        for picture in to_pil(levels):
            buffer = io.BytesIO()
            picture.save(buffer, format="JPEG", quality=JPEG_QUALITY)
            sizes.append(buffer.tell())
        return torch.tensor([sign * size / 1000 for size in sizes])

    return of_levels(score)


@torch.no_grad()
def judged_share(images: Tensor, prompts: list[str]) -> Tensor:
    """The fraction of a caption's attributes that the judge finds in its picture, [B]."""
    marks = judge(images, prompts)
    return torch.stack([marks[name] for name in ATTRIBUTES if name != "all"]).nanmean(0)


def random_reward(seed: int) -> Reward:
    """Uniform numbers that do not depend on the prompt; the same picture always gets the same number."""

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        levels = (images.detach().cpu() * 255).round().to(torch.uint8)
        return rng.uniform_batch(seed, "random reward", [picture.numpy().tobytes().hex() for picture in levels]).float()

    return score
