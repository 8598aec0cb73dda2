"""Encode the pictures and prompts of a run, once, divided among its processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from diffusion_align.commands.data.long_captions import describe_long_captions, opposite_pairs
from diffusion_align.data import DataError, EncodingSettings, Pair, PairCache, Ranking, build_cache
from diffusion_align.data.bad_rows import BadRow
from diffusion_align.data.disk import NoRoom
from diffusion_align.data.frames import Frames
from diffusion_align.data.shards import NotFinite, Ranks
from diffusion_align.data.stored_caches import OverLimit, make_room
from diffusion_align.options import TrainOffline
from diffusion_align.picture_size import sides
from diffusion_align.train.prediction_check import contradiction
from diffusion_align.train.processes import watch
from diffusion_align.train.processes.agree import sum_over_ranks

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage

CHECKED = 4  # pictures on which the network's prediction type is checked
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def frames_of(o: Any, model: TextToImage) -> Frames | None:
    """How the options crop pictures; None for the largest square in the middle.

    Raises:
        ValueError: a step of buckets that does not fit the model, or sizes for a model that is not told any.
    """
    if not isinstance(o, TrainOffline):
        return None
    told = o.size_conditioning == "pictures"
    if told and model.second is None:
        raise ValueError("size_conditioning pictures is for SDXL: this model is not told the size of a picture")
    if not (o.aspect_buckets or o.crops_at_random or o.random_flip or told):
        return None
    resolution = o.resolution or model.resolution
    step = o.bucket_step or max(model.size_step, 64 if min(sides(resolution)) >= 256 else 0)
    if step % model.size_step:
        raise ValueError(f"bucket_step {step} is not a multiple of {model.size_step}, which this model needs")
    return Frames(resolution, o.aspect_buckets, step, o.crop_variants if o.crops_at_random else 0, o.random_flip)


def describe_buckets(cache: PairCache) -> str:
    """A line aligned with those of a plan: how many entries of the data each shape has."""
    counts = Counter(cache.shape(index) for index in range(len(cache)))
    shown = ", ".join(f"{shape} ({count})" for shape, count in counts.most_common(8))
    return f"buckets          {len(counts)} shapes: {shown}{', ...' if len(counts) > 8 else ''}"


@watch.names_failed_rank()
def encoded(
    o: Any,
    model: TextToImage,
    accelerator: Accelerator,
    lists: Sequence[Pair] | Sequence[Ranking],
    known_bad: Sequence[BadRow] = (),
) -> PairCache:
    """The cache of these pairs or rankings: in --cache_dir, which runs can share, or in the run folder."""
    watch.record_activity("encoding")
    captions = list(dict.fromkeys(entry.prompt for entry in lists))
    if accelerator.is_main_process:
        long, limit = model.cut_captions(captions)
        if long:
            from diffusion_align.models.prompts.token_limit import kept_tokens

            pairs = [entry for entry in lists if isinstance(entry, Pair)]
            opposite = opposite_pairs(pairs, partial(kept_tokens, model.tokenizers, reading=model.reading))
            print(describe_long_captions(long, len(captions), limit, opposite))
    dtype = PRECISIONS[o.encode_precision]
    _ = model.empty_text  # encoded here in full precision; the model keeps it for drawing pictures
    frames = frames_of(o, model)
    settings = EncodingSettings(o.resolution or model.resolution, o.seed, precision=o.encode_precision, frames=frames)
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, partial(sum_over_ranks, accelerator))
    limit = o.cache_limit_gb
    try:
        with torch.autocast(model.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            cache = build_cache(
                model,  # pyright: ignore[reportArgumentType]  (a cached property is a property)
                lists,
                Path(o.cache_dir) / "encoded" if o.cache_dir else Path(o.output_dir) / "cache",
                settings,
                known_bad=known_bad,
                max_bad_fraction=o.max_bad_fraction,
                progress=accelerator.is_main_process,
                ranks=ranks,
                before_encoding=None if limit is None else partial(_keep_within, limit=int(limit * 1e9)),
            )
    except OverLimit as error:
        raise DataError(f"{error}; raise --cache_limit_gb, or use fewer with --max_train_samples") from error
    except (NoRoom, NotFinite) as error:
        no_room = "or give --cache_dir on another disk"
        cure = no_room if isinstance(error, NoRoom) else "encode in float32 with --encode_precision no"
        raise DataError(f"{error}; {cure}") from error
    if frames is not None and frames.buckets and accelerator.is_main_process:
        print(describe_buckets(cache))
    if cache.alike and accelerator.is_main_process:
        print(f"pictures         {cache.alike} of {len(cache)} compare a picture with itself, which teaches nothing")
    with accelerator.autocast():
        require_consistent_prediction(model, cache)
    return cache


def _keep_within(home: Path, size: int, limit: int) -> None:
    """Remove the caches that were not used for longest, and say which."""
    for old in make_room(home, size, limit):
        print(f"cache            {old.home} removed ({old.size / 1e9:.3g} GB), to keep within --cache_limit_gb")


def require_consistent_prediction(model: TextToImage, cache: PairCache) -> None:
    """Compare the base with what its scheduler says that it predicts, on the first pictures. Every rank does the same.

    Raises:
        ValueError: the network predicts something else; the message says what.
    """
    if not len(cache):
        return
    rows = [cache.batch([i]) for i in range(min(CHECKED, len(cache)))]
    latents, text = [latents[0, 0] for latents, _ in rows], torch.cat([text for _, text in rows])
    wrong = contradiction(model.predict, model.schedule, latents, text)
    if wrong is not None:
        raise ValueError(
            f"{model.source} is taken to predict {wrong.said}, but its network predicts {wrong.found}: at timestep "
            f"{wrong.timestep} its squared error is {wrong.errors[wrong.said]:.2f} of {wrong.said} and "
            f"{wrong.errors[wrong.found]:.3f} of {wrong.found}; give --prediction_type {wrong.found}"
        )
