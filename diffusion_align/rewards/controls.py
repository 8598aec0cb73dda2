"""Rewards that know nothing, or everything: the control, and the embedded world's judge."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.shapes import ATTRIBUTES, judge

from .pictures import Reward


@torch.no_grad()
def judged_share(images: Tensor, prompts: list[str]) -> Tensor:
    """The share of a caption's attributes that the judge finds in its picture, [B]."""
    marks = judge(images, prompts)
    return torch.stack([marks[name] for name in ATTRIBUTES if name != "all"]).nanmean(0)


def random_reward(seed: int) -> Reward:
    """A control: uniform numbers that know nothing of the prompt, the same for the same picture."""

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        levels = (images.detach().cpu() * 255).round().to(torch.uint8)
        return rng.uniform_batch(seed, "random reward", [picture.numpy().tobytes().hex() for picture in levels]).float()

    return score
