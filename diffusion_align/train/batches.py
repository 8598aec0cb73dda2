"""Which items each step of a round learns from: all pairs of its prompts, or N pairs of the round in shuffled order.

SPO's authors shuffle the pairs of a round over all ranks and take one step for each batch of them. Here a pair stays on
the rank that drew it, and only the step that it belongs to is drawn: at an address, over the pairs of all ranks in the
order of their prompts. So a step learns from the same pairs whatever the number of ranks and the size of chunks, and a
run that resumes inside a round takes the same steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Protocol

from diffusion_align import rng
from diffusion_align.train.method import Chunk, OnlineMethod, Round
from diffusion_align.train.processes.agree import values_by_rank

if TYPE_CHECKING:
    from accelerate import Accelerator


class ChunksOf(Protocol, Generic[Chunk]):
    """(the round, the number of the step in it, counted over all passes) -> the chunks of this rank in that step."""

    def __call__(self, round: Round[Chunk], number: int) -> list[Chunk]: ...


def steps_of(
    method: OnlineMethod[Chunk],
    round: Round[Chunk],
    items_per_step: int | None,
    address: tuple[int, int],
    where: Accelerator,
) -> tuple[int, ChunksOf[Chunk]]:
    """How many steps a pass over the round has, at least 1, and which chunks each step learns from.

    Args:
        items_per_step: items of a step over all ranks; the last step of a pass takes the rest. None: one step for each
            list of chunks in the round.
        address: (seed, prompts used before the round).

    Raises:
        ValueError: `items_per_step` for a method without `pick`.
    """
    if items_per_step is None:
        return len(round.chunks), lambda round, number: round.chunks[number % len(round.chunks)]
    pick = method.pick
    if pick is None:
        raise ValueError("this method learns from all items of a prompt together: use prompts_per_step")
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
