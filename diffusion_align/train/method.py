"""What the two engines ask of a method, and what a round of online training has drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

Sample = tuple[int, int]
"""(epoch, index in the data): the address of everything drawn for it."""

Columns = dict[str, Tensor]
"""Numbers of what was collected or learnt from, [M] each: a row an item, a picture or a group."""


@dataclass(frozen=True)
class Survey:
    """A pass over all samples of a step before its gradients, for a loss whose terms depend on the whole batch.

    measure: samples [b] -> columns [b], called without gradients on each micro-batch.
    receive: is given those columns of the whole batch [batch_size], in stream order, float64 on the CPU.
    """

    measure: Callable[[list[Sample]], Columns]
    receive: Callable[[Columns], None]


@dataclass(frozen=True)
class OfflineMethod:
    """A method that learns from n items of data, as `steps.run_steps` asks it.

    micro_batch: (samples [b], all samples of the step) -> columns [b], "loss" among them with its graph.
    summarise: the columns of the whole batch [batch_size], in stream order -> metrics.
    check_start: called with those columns in the first step of a fresh run, before the update; raises to stop.
    survey: made before the gradients of each step, unless one micro-batch holds the whole step.
    """

    n: int
    micro_batch: Callable[[list[Sample], list[Sample]], Columns]
    summarise: Callable[[Columns], dict[str, float]]
    check_start: Callable[[Columns], None] | None = None
    survey: Survey | None = None


class Movable(Protocol):
    """A chunk of what was drawn. It waits in main memory, so the device holds one chunk however large a round is."""

    def to(self, device: torch.device | str, /) -> Self: ...

    def cut(self, times: int, /) -> list[Self]:
        """In so many parts, or in as many as there are groups that must stay together."""
        ...


Chunk = TypeVar("Chunk", bound=Movable)


@dataclass(frozen=True)
class OnlineMethod(Generic[Chunk]):
    """A method that draws its own data, as `rounds.run_rounds` asks it.

    collect: (samples (epoch, prompt), round) -> a chunk of whole groups, drawn without gradients. The round is named by
        the prompts used before it: an address for what all of it shares.
    score: chunk -> the same with its rewards; None where collecting has scored already.
    again: (chunk, whether the policy is still the one that drew it) -> the same with the networks' predictions made
        anew, in a batch of this chunk's shape, and by how much they changed; None where a chunk holds none.
    ahead: score a chunk while the next is drawn. It pays where drawing leaves the processor idle, as on a GPU, or
        scoring does, as a reward elsewhere.
    items: how many pairs or groups of a chunk can be learnt from; 0 where all are tied or filtered out.
    learn: (chunk, factor) -> columns of its items, "loss" among them; adds the gradient of factor x the sum of losses.
    facts: chunk -> columns of its pictures, such as "reward".
    summarise: (columns of the items of a step, facts of its round) -> metrics. The items may be none.
    check_start: called with the columns of the first step of a fresh run, before the update; raises to stop.
    pick: (chunks, numbers [m], rising) -> chunks of those items alone. Items are counted from 0 in the order of their
        prompts, whatever the chunks are. None where items are not learnt from apart from their groups.
    nothing: what to do about a step without items, for the message that ends a run of such steps.
    """

    collect: Callable[[list[Sample], int], Chunk]
    items: Callable[[Chunk], int]
    learn: Callable[[Chunk, float], Columns]
    facts: Callable[[Chunk], Columns]
    summarise: Callable[[Columns, Columns], dict[str, float]]
    check_start: Callable[[Columns], None] | None
    nothing: str
    score: Callable[[Chunk], Chunk] | None = None
    again: Callable[[Chunk, bool], tuple[Chunk, float]] | None = None
    ahead: bool = False
    pick: Callable[[list[Chunk], Tensor], list[Chunk]] | None = None


@dataclass(frozen=True, eq=False)
class Round(Generic[Chunk]):
    """This rank's data of a round: for each step of a pass its chunks, in main memory. `halvings`: how often chunks had
    been halved because memory ran out when they were drawn."""

    chunks: list[list[Chunk]]
    halvings: int
