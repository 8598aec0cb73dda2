"""The stream of samples where items have groups, such as pictures of one shape, and a micro-batch holds one group.

Each group has a stream of its own, with its own epochs and orders. After k epochs of the data a group of m items has
given the floor of k m / r micro-batches of r samples, so no group lags by a micro-batch. The micro-batches of an epoch
are shuffled. All of it follows from the seed and a position, as the plain stream does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from diffusion_align import rng
from diffusion_align.train.method import Sample


def members_of(groups: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The items of each group, from the group of each item; groups in the order of their numbers."""
    return tuple(tuple(i for i, group in enumerate(groups) if group == one) for one in sorted(set(groups)))


def grouped_samples_at(
    position: int, count: int, members: tuple[tuple[int, ...], ...], rows: int, seed: int
) -> list[Sample]:
    """The `count` samples after the first `position` samples of the stream, in micro-batches of `rows`.

    The epoch of a sample counts how often its group has been gone through. Raises ValueError for positions and counts
    that are no multiples of `rows`.
    """
    if position % rows or count % rows:
        raise ValueError(f"position {position} and count {count} are multiples of the {rows} rows of a micro-batch")
    samples: list[Sample] = []
    for place in range(position // rows, (position + count) // rows):
        group, number = _micro_batch(place, members, rows, seed)
        size = len(members[group])
        for visit in range(number * rows, (number + 1) * rows):
            epoch, offset = divmod(visit, size)
            samples.append((epoch, members[group][_order(size, seed, epoch, group)[offset]]))
    return samples


def _micro_batch(place: int, members: tuple[tuple[int, ...], ...], rows: int, seed: int) -> tuple[int, int]:
    """The group of a micro-batch, and its number among those of that group."""
    sizes = tuple(map(len, members))
    epoch = place * rows // sum(sizes)  # floors make an epoch start later than that, never earlier
    while _begin(epoch + 1, sizes, rows) <= place:
        epoch += 1
    first = _begin(epoch, sizes, rows)
    return _slots(epoch, sizes, rows, seed)[place - first]


def _begin(epoch: int, sizes: tuple[int, ...], rows: int) -> int:
    """The first micro-batch of an epoch."""
    return sum(epoch * size // rows for size in sizes)


@lru_cache(maxsize=4)
def _slots(epoch: int, sizes: tuple[int, ...], rows: int, seed: int) -> list[tuple[int, int]]:
    slots = [
        (group, number)
        for group, size in enumerate(sizes)
        for number in range(epoch * size // rows, (epoch + 1) * size // rows)
    ]
    return [slots[i] for i in rng.permutation(len(slots), seed, "groups", epoch).tolist()]


@lru_cache(maxsize=64)
def _order(size: int, seed: int, epoch: int, group: int) -> list[int]:
    return rng.permutation(size, seed, "shuffle", epoch, group).tolist()
