"""How the trajectories of an online method are drawn and scored, and which networks they are compared under."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic

import torch
from torch import Tensor

from diffusion_align.methods.shared.metrics import round_columns, summarise_runs
from diffusion_align.methods.shared.runs import Bind, Runs, Score, repredict
from diffusion_align.methods.shared.start_checks import Allowed, require_equal_ratios
from diffusion_align.rewards import Reward
from diffusion_align.system.memory import in_parts
from diffusion_align.train.method import Chunk, Columns, OnlineMethod, Sample

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage

ALL_TIED = "all pictures of each prompt had the same reward, or it failed; raise group_size, or check the reward"


@dataclass(frozen=True)
class Rollouts(Generic[Chunk]):
    """What an online method learns from.

    draw: (samples (epoch, prompt), prompts used before the round) -> a chunk of trajectories or comparisons.
    policy, reference: networks with guidance, as functions of the prompt. reference None: the policy that drew the
        round. dims: D, of a latent. allowed: differences at the start that rounding explains.
    score: chunk -> the chunk with rewards; None if `draw` scores. score_ahead: score while the next chunk is drawn.
    """

    draw: Callable[[list[Sample], int], Chunk]
    policy: Bind
    reference: Bind | None
    dims: int
    allowed: Allowed
    score: Callable[[Chunk], Chunk] | None = None
    score_ahead: bool = False


def method_on_runs(
    rollouts: Rollouts[Runs], learn: Callable[[Runs, float], Columns], items: Callable[[Runs], int]
) -> OnlineMethod[Runs]:
    """A method that compares the finished pictures of a prompt. learn, items: as in `OnlineMethod`."""
    return OnlineMethod(
        collect=rollouts.draw,
        score=rollouts.score,
        score_ahead=rollouts.score_ahead,
        items=items,
        learn=learn,
        round_columns=round_columns,
        summarise=partial(summarise_runs, dims=rollouts.dims),
        check_start=partial(require_equal_ratios, dims=rollouts.dims, allowed=rollouts.allowed),
        empty_step_advice=ALL_TIED,
        repredict=partial(repredict, policy=rollouts.policy, reference=rollouts.reference),
    )


def reward_of_latents(model: TextToImage, reward: Reward, chunk: int) -> Score:
    """`(latents [B,...], prompts) -> [B]`, decoded `chunk` at a time, or fewer if memory runs out."""

    def score(latents: Tensor, prompts: list[str]) -> Tensor:
        def score_rows(rows: slice) -> Tensor:
            return reward(model.decode(latents[rows]), prompts[rows])

        return torch.cat(in_parts(score_rows, len(prompts), chunk, "scoring pictures")[0])

    return score
