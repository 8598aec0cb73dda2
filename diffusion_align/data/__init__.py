"""Reading preference data: strict picture decoding, pairs from the layouts people have, and the cache of encodings."""

from diffusion_align.data.cache import PairCache, build_cache
from diffusion_align.data.pairs import Counts, Pair, read_pairs, write_pairs_parquet
from diffusion_align.data.readers import DataError

__all__ = ["Counts", "DataError", "Pair", "PairCache", "build_cache", "read_pairs", "write_pairs_parquet"]
