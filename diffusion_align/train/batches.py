"""What each step of a round learns from: all pairs of its prompts, or so many pairs of the whole round, shuffled.

SPO's authors shuffle the pairs of a round over all processes and take a step for each batch of them. Here a pair stays
with the process that drew it, and only which step it belongs to is drawn: at an address, over all pairs of all
processes in the order of their prompts. So neither the number of processes nor the chunks decide what a step learns
from, and a run that goes on in the middle of a round finds the same steps again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol

from diffusion_align import rng
from diffusion_align.train.method import Chunk, OnlineMethod, Round
from diffusion_align.train.processes.agree import values_by_rank

if TYPE_CHECKING:
    from accelerate import Accelerator


class ChunksOf(Protocol, Generic[Chunk]):
    """(the round, the step's number in it, over all passes) -> what this process learns from in that step."""

    def __call__(self, round: Round[Chunk], number: int) -> list[Chunk]: ...


def steps_of(
    method: OnlineMethod[Chunk],
    round: Round[Chunk],
    items_per_step: int | None,
    address: tuple[int, int],
    where: Accelerator,
) -> tuple[int, ChunksOf[Chunk]]:
    """How many steps a pass over the round has, at least 1, and which of the round's chunks each step learns from.

    Args:
        items_per_step: items of a step over all processes, the last step of a pass taking what is left; None: a step
            for each list of the round's chunks.
        address: (seed, prompts used before the round).

    Raises:
        ValueError: a method whose items cannot be picked out of their chunks.
    """
    if items_per_step is None:
        return len(round.chunks), lambda round, number: round.chunks[number % len(round.chunks)]
    pick = method.pick
    if pick is None:
        raise ValueError("this method learns from whole prompts: give prompts_per_step in place of items_per_step")
    counts = values_by_rank(where, sum(method.items(chunk) for chunks in round.chunks for chunk in chunks))
    total, before = sum(counts), sum(counts[: where.process_index])
    count = max(1, -(-total // items_per_step))
    seed, used = address

    def step(round: Round[Chunk], number: int) -> list[Chunk]:
        which, place = divmod(number, count)
        order = rng.permutation(total, seed, "pairs", used, which)
        taken = order[place * items_per_step : (place + 1) * items_per_step].sort().values
        mine = taken[(taken >= before) & (taken < before + counts[where.process_index])] - before
        return pick([chunk for chunks in round.chunks for chunk in chunks], mine) if len(mine) else []

    return count, step
