"""Preference data: read in the layouts that people have, decoded strictly, encoded once into a cache.

What needs torch is imported when it is used, so that looking at a folder does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

from diffusion_align.data.bad_rows import Counts, DataError
from diffusion_align.data.pairs_and_rankings import Pair, Ranking, write_pairs_parquet, write_rankings_parquet
from diffusion_align.data.read import read_pairs, read_rankings

if TYPE_CHECKING:
    from diffusion_align.data.cache import EncodingSettings, PairCache, build_cache

__all__ = [
    "Counts",
    "DataError",
    "EncodingSettings",
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
    if name in ("EncodingSettings", "PairCache", "build_cache"):
        from diffusion_align.data import cache

        return getattr(cache, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
