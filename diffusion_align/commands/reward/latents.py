"""Rewards by name for training, and the one function that decodes latents and scores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_align.rewards import Reward, load_reward
from diffusion_align.rewards.clip import resolve_source
from diffusion_align.rewards.controls import judged_share, random_reward
from diffusion_align.rewards.spec import read_spec
from diffusion_align.system.memory import in_parts

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage

__all__ = ["decoded", "judged_share", "random_reward", "require_reward", "reward_by_name"]


def require_reward(name: str | None) -> None:
    """Raise ValueError or FileNotFoundError for a text that `reward_by_name` cannot know; loads nothing."""
    for part in read_spec(name).parts if name is not None else ():
        if part.kind in ("tiny", "open_clip"):
            resolve_source(part.at or part.kind)


def reward_by_name(name: str, *, device: torch.device, seed: int) -> Reward:
    """The reward that a text means: a name of `reward ls`, one of its forms, or several together (docs/rewards.md).

    Raises:
        ValueError: not a reward, or "people", who choose between pictures of a run and score none alone.
        FileNotFoundError: its weights are not to be had.
    """
    return load_reward(name, device=device, seed=seed)


def decoded(model: TextToImage, reward: Reward, chunk: int) -> Callable[[Tensor, list[str]], Tensor]:
    """`(latents [B,...], prompts) -> [B]`: no more than `chunk` pictures exist at a time, or half as many where memory
    runs out."""

    def score(latents: Tensor, prompts: list[str]) -> Tensor:
        def part(rows: slice) -> Tensor:
            return reward(model.decode(latents[rows]), prompts[rows])

        return torch.cat(in_parts(part, len(prompts), chunk, "scoring pictures")[0])

    return score
