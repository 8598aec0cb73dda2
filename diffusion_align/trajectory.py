"""The record of one pass of the sampler, without rewards, prompts, groups and preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor


class Sized(Protocol):
    """A step table, of which the record needs only the number of steps."""

    def __len__(self) -> int: ...


Table = TypeVar("Table", bound=Sized)


@dataclass(frozen=True, eq=False)
class Trajectory(Generic[Table]):
    """One batch of trajectories from noise (`states[0]`) to the clean sample (`states[-1]`); `table` is the sampler's
    step table.

    states: [T+1,B,...], as stored: a rounded state is the one that was fed back and scored.
    log_prob: [T,B] nats summed over dims, of the policy that ran; 0 at steps without noise (see `table.stochastic`).
    clean: [T,B,...] the clean predictions along the trajectory, or None.
    seeds: of the generators, one per sample; set by the caller, for information.
    parents: [B] int64 index of the trajectory each one was branched from, or None.

    Raises ValueError when the lengths disagree.
    """

    states: Tensor
    log_prob: Tensor
    table: Table
    clean: Tensor | None = None
    seeds: Sequence[int | str] | None = None
    parents: Tensor | None = None

    def __post_init__(self) -> None:
        steps, batch = len(self.table), self.states.shape[1]
        if self.states.shape[0] != steps + 1 or tuple(self.log_prob.shape) != (steps, batch):
            shapes = f"states {list(self.states.shape)} and log_prob {list(self.log_prob.shape)}"
            raise ValueError(f"{shapes} do not fit a table of {steps} steps: expected [T+1,B,...] and [T,B]")
        if self.clean is not None and self.clean.shape != self.states[1:].shape:
            raise ValueError(f"clean is {list(self.clean.shape)}, expected {list(self.states[1:].shape)}")
        for name, field in (("seeds", self.seeds), ("parents", self.parents)):
            if field is not None and len(field) != batch:
                raise ValueError(f"{name} has {len(field)} entries for {batch} trajectories")
