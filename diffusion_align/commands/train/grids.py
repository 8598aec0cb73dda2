"""Sample grids: the same prompts and seeds during the whole run, base model beside current weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from diffusion_align.evaluation import Drawing, evaluation_table, generate, pairs_picture, read_pictures, save_pictures
from diffusion_align.models import TextToImage
from diffusion_align.system.progress import progress_bar

DEFAULT_PROMPTS = 4
SHEET_SIDE = 192  # pixels to which pictures of small models are enlarged
BATCH = 8
logger = logging.getLogger(__name__)


def grid_prompts(given: tuple[str, ...], of_the_data: Iterable[str]) -> list[str]:
    """The given prompts, or the first different ones of the data."""
    return list(given) or list(dict.fromkeys(of_the_data))[:DEFAULT_PROMPTS]


def base_pictures(
    model: TextToImage, prompts: list[str], folder: Path, *, seed: int, steps: int, guidance: float,
    resolution: int | str | None,
) -> Tensor:  # fmt: skip
    """The pictures [N,3,H,W] of the base model, read from `folder` if they exist; call it before the policy changes."""
    drawing = Drawing(evaluation_table(model.schedule, steps), guidance, seed, BATCH, resolution=resolution)
    with progress_bar(total=len(prompts), desc="sample grid of the base", unit="picture") as bar:
        for _ in save_pictures(model, prompts, folder, drawing, progress=bar.update):
            pass  # each iteration writes a batch
    return torch.cat([pictures for _, pictures in read_pictures(folder, len(prompts))])


def write_grid(
    model: TextToImage, prompts: list[str], base: Tensor, path: Path, *, seed: int, steps: int, guidance: float,
    resolution: int | str | None,
) -> None:  # fmt: skip
    """Draw the prompts with the current weights and write both side by side; a full disk causes a warning only."""
    drawing = Drawing(evaluation_table(model.schedule, steps), guidance, seed, BATCH, resolution=resolution)
    with progress_bar(total=len(prompts), desc=f"sample grid {path.stem}", unit="picture") as bar:
        now = torch.cat([pictures for _, pictures in generate(model, prompts, drawing, progress=bar.update)])
    factor = max(1, SHEET_SIDE // now.shape[-1])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs_picture(base, now, prompts, [(None, None)] * len(prompts), path, columns=2, factor=factor)
    except OSError as error:
        logger.warning("%s: the sample grid could not be written (%s); the training continues", path, error)
