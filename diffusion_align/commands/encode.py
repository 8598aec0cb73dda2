"""Pictures and prompts of a run through their encoders, once, on the main process first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from diffusion_align.data import Pair, PairCache, Ranking, build_cache
from diffusion_align.data.readers import BadRow
from diffusion_align.options import TrainOffline, TrainSpm
from diffusion_align.train import watch
from diffusion_align.train.agree import main_first

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage


@watch.named()
def encoded(
    o: TrainOffline | TrainSpm,
    gate: TextToImage,
    accelerator: Accelerator,
    lists: Sequence[Pair] | Sequence[Ranking],
    known_bad: Sequence[BadRow] = (),
) -> PairCache:
    """The cache of these pairs or rankings: in --cache_dir, which runs can share, or else in the run folder."""
    watch.doing("encoding")
    with main_first(accelerator):
        return build_cache(
            gate,  # pyright: ignore[reportArgumentType]  (a cached property is a property)
            lists,
            Path(o.cache_dir) / "encoded" if o.cache_dir else Path(o.output_dir) / "cache",
            resolution=o.resolution or gate.resolution,
            seed=o.seed,
            known_bad=known_bad,
            max_bad_fraction=o.max_bad_fraction,
            progress=accelerator.is_main_process,
        )
