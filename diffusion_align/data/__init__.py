"""Reading preference data: strict picture decoding, pairs and rankings from the layouts people have, and the cache of
encodings."""

from diffusion_align.data.cache import PairCache, build_cache
from diffusion_align.data.layouts import Pair, Ranking
from diffusion_align.data.pairs import Counts, read_pairs, write_pairs_parquet
from diffusion_align.data.rankings import read_rankings, write_rankings_parquet
from diffusion_align.data.readers import DataError

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
