"""Rewards by name for training, and the one function that decodes latents and scores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.rewards import Reward, clip_scorer
from diffusion_align.rewards.clip import resolve_source
from diffusion_align.shapes import ATTRIBUTES, judge

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage


def require_reward(name: str | None) -> None:
    """Raise ValueError for a name that `reward_by_name` cannot know; loads nothing."""
    if name not in (None, "judge", "random", "people"):
        resolve_source(name)


def reward_by_name(name: str, *, device: torch.device, seed: int) -> Reward:
    """ "judge", "random", or whatever `clip_scorer` takes.

    Raises:
        ValueError: not the name of a reward, or "people", who choose between pictures of a run and score none alone.
    """
    if name == "people":
        raise ValueError("reward people chooses between a prompt's pictures: it is for train d3po, prdp and ddpo")
    if name == "judge":
        return judged_share
    if name == "random":
        return random_reward(seed)
    return clip_scorer(name, device=device)


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


def decoded(gate: TextToImage, reward: Reward, chunk: int) -> Callable[[Tensor, list[str]], Tensor]:
    """`(latents [B,...], prompts) -> [B]`: no more than `chunk` pictures exist at a time."""

    def score(latents: Tensor, prompts: list[str]) -> Tensor:
        rows = range(0, len(prompts), chunk)
        return torch.cat([reward(gate.decode(latents[i : i + chunk]), prompts[i : i + chunk]) for i in rows])

    return score
