"""Pictures for `sample`: each at the address (seed, "sample", prompt's number, image's number), in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_align.evaluation.generate import require_finite
from diffusion_align.options import Sample
from diffusion_align.rng import draw_normal, generator
from diffusion_align.samplers import StepTable
from diffusion_align.samplers import sample as run_sampler
from diffusion_align.system.progress import counted

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage

Place = tuple[int, int]
"""Prompt's number, image's number."""
Draw = Callable[[list[Place], Callable[[float], object]], Iterator[tuple[Place, Tensor]]]
"""Pictures [3,H,W] of some places, in that order. The second argument is called after every step of the sampler with
its worth in pictures, such as 8 / 25: a bar's `update`."""


@torch.no_grad()
def draw(
    model: TextToImage,
    prompts: list[str],
    table: StepTable,
    o: Sample,
    resolution: int | str | None,
    wanted: list[Place],
    progress: Callable[[float], object],
) -> Iterator[tuple[Place, Tensor]]:
    """Yield each place that is wanted and its picture [3,H,W] in [0, 1], the same whatever the batch size.

    Raises:
        ValueError: a picture with numbers that are not finite.
    """
    # Without one: SDXL's own, which may be zeros.
    negative = model.encode_text([o.negative_prompt]) if o.negative_prompt else None
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(o.mixed_precision)
    for start in range(0, len(wanted), o.batch_size):
        chunk = wanted[start : start + o.batch_size]
        sources = [generator(o.seed, "sample", *place) for place in chunk]
        noise = torch.stack([draw_normal(model.latent_shape(resolution), source) for source in sources])
        text = model.encode_text([prompts[number] for number, _ in chunk])
        with torch.autocast(model.device.type, dtype=half, enabled=half is not None):
            denoiser = counted(model.denoiser(text, o.guidance, negative), partial(progress, len(chunk) / len(table)))
            latents = run_sampler(denoiser, table, noise.to(model.device), sources)
        for place, picture in zip(chunk, model.decode(latents).cpu(), strict=True):
            require_finite(picture, place[0])
            yield place, picture
