"""Captions that are longer than a text encoder reads, in lines of text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.disk import digest
from diffusion_align.data.pairs_and_rankings import Pair
from diffusion_align.data.rows.raw_rows import read_bytes


def describe_long_captions(cut: int, of: int, limit: int, opposite: int = 0) -> str:
    """A line aligned with those of a plan. `limit` counts tokens, begin and end of text among them; `opposite` is the
    number of pairs that `opposite_pairs` counts."""
    reads = f"the {limit} tokens that the text encoder reads"
    if not cut:
        return f"captions         all {of} fit {reads}"
    more = f"; {opposite} pairs then contradict another of the same pictures" if opposite else ""
    return f"captions         {cut} of {of} are longer than {reads}: the rest of each is cut off{more}"


def opposite_pairs(pairs: Sequence[Pair], kept: Callable[[str], bytes]) -> int:
    """How many pairs prefer the opposite of another pair, of the same two pictures, whose caption the text encoder
    cannot tell from theirs. `kept` gives what it reads of a caption. Pictures are read only where captions collide;
    one that cannot be read counts nowhere."""
    captions: dict[bytes, set[str]] = defaultdict(set)
    for caption in dict.fromkeys(pair.prompt for pair in pairs):
        captions[kept(caption)].add(caption)
    colliding = {text: key for key, texts in captions.items() if len(texts) > 1 for text in texts}
    orders: dict[tuple[bytes, str, str], int] = defaultdict(int)
    for pair in pairs:
        if pair.prompt in colliding and not pair.tie:
            try:
                winner, loser = (digest(read_bytes(picture)) for picture in (pair.winner, pair.loser))
            except (DataError, OSError):
                continue
            orders[colliding[pair.prompt], winner, loser] += 1
    return sum(count for (key, winner, loser), count in orders.items() if (key, loser, winner) in orders)
