"""The interface between the two engines and a method, and the data of a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

Sample = tuple[int, int]
"""(epoch, index in the data): the address of all random draws for it."""

Columns = dict[str, Tensor]
"""Named columns of M numbers, one row per item, picture or group."""


@dataclass(frozen=True)
class Survey:
    """A pass without gradients over all samples of a step, for a loss whose terms depend on the whole batch.

    measure: samples [b] -> columns [b], called without gradients on each micro-batch.
    receive: gets those columns of the whole batch [batch_size], in stream order, float64 on the CPU.
    """

    measure: Callable[[list[Sample]], Columns]
    receive: Callable[[Columns], None]


@dataclass(frozen=True)
class OfflineMethod:
    """A method that learns from n items of data, for `steps.run_steps`.

    micro_batch: (samples [b], all samples of the step) -> columns [b]; the column "loss" has a graph.
    summarise: the columns of the whole batch [batch_size], in stream order -> metrics.
    check_start: called with those columns in the first step of a fresh run, before the update; raises to stop.
    survey: runs before the gradients of each step, unless one micro-batch holds the whole step.
    groups: [n] the group of each item, where a micro-batch must hold one group, such as pictures of one shape.
    """

    n: int
    micro_batch: Callable[[list[Sample], list[Sample]], Columns]
    summarise: Callable[[Columns], dict[str, float]]
    check_start: Callable[[Columns], None] | None = None
    survey: Survey | None = None
    groups: Sequence[int] | None = None


class Movable(Protocol):
    """A chunk of drawn data. It is kept in main memory, so the device holds one chunk however large a round is."""

    def to(self, device: torch.device | str, /) -> Self: ...

    def split(self, times: int, /) -> list[Self]:
        """Split into `times` smaller chunks, or one per group that must stay together if there are fewer groups."""
        ...


Chunk = TypeVar("Chunk", bound=Movable)


@dataclass(frozen=True)
class OnlineMethod(Generic[Chunk]):
    """A method that draws its own data, for `rounds.run_rounds`.

    collect: (samples (epoch, prompt), round) -> a chunk of complete groups, drawn without gradients. `round` is the
        number of prompts used before the round: the address of random draws that its prompts share.
    score: chunk -> the chunk with rewards; None if `collect` scores.
    repredict: (chunk, whether the policy is still the one that drew it) -> the chunk with new network predictions, made
        in a batch of this shape, and by how much they changed; None if chunks hold no predictions.
    score_ahead: score a chunk while the next one is drawn. This is faster if drawing leaves the processor idle (on a
        GPU), or if scoring does (a reward on another machine).
    items: how many pairs or groups of a chunk can be learned from; 0 if all are tied or filtered out.
    learn: (chunk, factor) -> columns of its items, including "loss"; adds the gradient of factor x the sum of losses.
    round_columns: chunk -> columns of its pictures, such as "reward".
    summarise: (columns of the items of a step, `round_columns` of its round) -> metrics. There may be no items.
    check_start: called with the columns of the first step of a fresh run, before the update; raises to stop.
    pick: (chunks, increasing numbers [m]) -> chunks of those items only. Items are numbered from 0 in the order of
        their prompts, independent of chunks. None if the items of a group must stay together.
    empty_step_advice: what to do if no step has items, for the message that ends such a run.
    """

    collect: Callable[[list[Sample], int], Chunk]
    items: Callable[[Chunk], int]
    learn: Callable[[Chunk, float], Columns]
    round_columns: Callable[[Chunk], Columns]
    summarise: Callable[[Columns, Columns], dict[str, float]]
    check_start: Callable[[Columns], None] | None
    empty_step_advice: str
    score: Callable[[Chunk], Chunk] | None = None
    repredict: Callable[[Chunk, bool], tuple[Chunk, float]] | None = None
    score_ahead: bool = False
    pick: Callable[[list[Chunk], Tensor], list[Chunk]] | None = None


@dataclass(frozen=True, eq=False)
class Round(Generic[Chunk]):
    """The data of a round on this rank: the chunks of each step of a pass, in main memory.

    halvings: how often these chunks were halved because memory ran out."""

    chunks: list[list[Chunk]]
    halvings: int
