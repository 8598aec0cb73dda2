"""What is encoded, for whom, and how its parts are shared out over the processes of a job.

Processes that are done wait for the others a piece at a time, not once for hours: after every piece all of them meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffusion_align.data.layouts import Pair, Ranking

# Lists whose bytes are in memory together; the largest batch for the VAE is K times that.
CHUNK = 16


class Encoders(Protocol):
    """The part of the model that a cache needs (models.TextToImage has it)."""

    @property
    def empty_text(self) -> Tensor: ...
    def fingerprint(self) -> str: ...
    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]: ...
    def encode_text(self, prompts: list[str]) -> Tensor: ...
    def encode_images(self, images: Tensor, noise: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Share:
    """Which of the processes this one is. `meet(n)`: the sum of n over all, once all are there; without it, alone."""

    rank: int = 0
    ranks: int = 1
    meet: Callable[[int], int] = lambda n: n

    def of(self, shards: range) -> range:
        """This process's part of some shards."""
        return shards[self.rank :: self.ranks]


def together(share: Share, left: int, work: Iterator[int], reach: Callable[[int], object]) -> None:
    """Do this process's `work` while the others do theirs. A piece of it yields how many items are left, 0 at the end;
    `reach` is told how many all have done."""
    every = rest = share.meet(left)
    while rest:
        left = next(work, 0)
        rest = share.meet(left)
        reach(every - rest)


@dataclass(frozen=True)
class Job:
    """What is encoded, for whom and where to. `per_shard`: lists, and prompts, of a shard."""

    model: Encoders
    lists: Sequence[Pair] | Sequence[Ranking]
    home: Path
    share: Share
    resolution: int
    seed: int
    dtype: torch.dtype
    per_shard: tuple[int, int]
    prompts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", list(dict.fromkeys(entry.prompt for entry in self.lists)))

    @property
    def kind(self) -> str:
        return "ranking" if isinstance(self.lists[0], Ranking) else "pair"

    @property
    def list_shards(self) -> range:
        return range(-(-len(self.lists) // self.per_shard[0]))

    @property
    def text_shards(self) -> range:
        return range(-(-len(self.prompts) // self.per_shard[1]))

    def rows(self, shard: int) -> range:
        """The lists of a shard."""
        first = shard * self.per_shard[0]
        return range(first, min(first + self.per_shard[0], len(self.lists)))

    def name(self, shard: int) -> str:
        """A shard's files without their endings."""
        return f"{self.kind}s-{shard:05d}"
