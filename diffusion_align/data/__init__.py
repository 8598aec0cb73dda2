"""Reading preference data: the layouts people have, strict picture decoding, pairs and rankings, and the cache of
encodings. What needs torch is imported when it is asked for, so that looking at a folder does not wait for it."""

from typing import TYPE_CHECKING, Any

from diffusion_align.data.layouts import Pair, Ranking
from diffusion_align.data.pairs_and_rankings import Counts, read_pairs, write_pairs_parquet
from diffusion_align.data.rankings import read_rankings, write_rankings_parquet
from diffusion_align.data.raw_rows import DataError

if TYPE_CHECKING:
    from diffusion_align.data.cache import PairCache, build_cache

__all__ = [
    "Counts",
    "DataError",
    "Pair",
    "PairCache",
    "Ranking",
    "build_cache",
    "read_pairs",
    "read_rankings",
    "write_pairs_parquet",
    "write_rankings_parquet",
]


def __getattr__(name: str) -> Any:
    if name in ("PairCache", "build_cache"):
        from diffusion_align.data import cache

        return getattr(cache, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
