"""Split the chunks of a round that are too large to learn from, and repeat the predictions that they hold.

A network rounds differently in a batch of another shape. Predictions stored while drawing would therefore differ from
those of a smaller chunk, and the importance ratio would not be 1 before the first update.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from diffusion_align.system.memory import logger
from diffusion_align.train.method import Chunk, OnlineMethod, Round


def rechunk(
    method: OnlineMethod[Chunk], round: Round[Chunk], halvings: int, unmoved: bool, device: torch.device
) -> Round[Chunk]:
    """The round in chunks that were halved `halvings` times in total.

    It is returned unchanged if it is so already, or if its chunks hold no predictions (SPO): each step can then split
    them. `unmoved`: the policy is still the one that drew the round. If not, its predictions cannot be repeated and
    keep the rounding of the larger batch.
    """
    times = 2 ** (halvings - round.halvings)
    if times == 1 or method.repredict is None:
        return round
    chunks, changes = [], [0.0]
    for of_step in round.chunks:
        chunks.append([])
        for chunk in of_step:
            smaller = chunk.split(times)
            for one in smaller:
                if len(smaller) > 1 and method.items(one):
                    one, change = method.repredict(one.to(device), unmoved)
                    one = one.to("cpu")
                    changes.append(change)
                chunks[-1].append(one)
    if len(changes) > 1:
        what = "drawn predictions" if unmoved else "the reference's predictions"
        logger.warning(
            "%s are repeated in the smaller chunks, because another batch shape rounds differently%s",
            what, f": they differ by up to {max(changes):.1e}, relative" if unmoved else "; the policy has moved on",
        )  # fmt: skip
    return replace(round, chunks=chunks, halvings=halvings)
