"""A reward of latents, for training: decode, then score."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_align.rewards import Reward
from diffusion_align.system.memory import in_parts

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage


def reward_of_latents(model: TextToImage, reward: Reward, chunk: int) -> Callable[[Tensor, list[str]], Tensor]:
    """`(latents [B,...], prompts) -> [B]`, decoded `chunk` at a time, or half as many after running out of memory."""

    def score(latents: Tensor, prompts: list[str]) -> Tensor:
        def score_rows(rows: slice) -> Tensor:
            return reward(model.decode(latents[rows]), prompts[rows])

        return torch.cat(in_parts(score_rows, len(prompts), chunk, "scoring pictures")[0])

    return score
