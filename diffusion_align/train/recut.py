"""A round whose chunks turn out too large to learn from: cut, and what depends on the batch asked again.

A network rounds differently in a batch of another shape. Predictions that were stored while drawing and predictions of
a smaller piece would then differ before anything is learnt, and the ratio of policies with them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from diffusion_align.system.memory import logger
from diffusion_align.train.method import Chunk, OnlineMethod, Round


def recut(
    method: OnlineMethod[Chunk], round: Round[Chunk], halvings: int, unmoved: bool, device: torch.device
) -> Round[Chunk]:
    """The round in chunks that were halved `halvings` times in all; the same one where it is already, or where nothing
    in it depends on the batch it was drawn in (SPO), so that it may be cut anew in each step.

    `unmoved`: the policy is still the one that drew the round. If not, its predictions cannot be asked again, and keep
    the rounding of the larger batch.
    """
    times = 2 ** (halvings - round.halvings)
    if times == 1 or method.again is None:
        return round
    chunks, changes = [], [0.0]
    for of_step in round.chunks:
        chunks.append([])
        for chunk in of_step:
            parts = chunk.cut(times)
            for part in parts:
                if len(parts) > 1 and method.items(part):
                    part, change = method.again(part.to(device), unmoved)
                    part = part.to("cpu")
                    changes.append(change)
                chunks[-1].append(part)
    if len(changes) > 1:
        what = "drawn predictions" if unmoved else "the reference's predictions"
        logger.warning(
            "%s are made anew in the smaller chunks, as another batch shape rounds differently%s",
            what, f": they differ by up to {max(changes):.1e}, relative" if unmoved else "; the policy has moved on",
        )  # fmt: skip
    return replace(round, chunks=chunks, halvings=halvings)
