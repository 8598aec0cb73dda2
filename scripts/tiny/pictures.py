"""Rendered pictures as tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from diffusion_align.shapes import parse, render
from diffusion_align.shapes.caption import ALL_THINGS
from diffusion_align.shapes.render import PALETTE, PIXELS, draw_thing


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """`[N,3,H,W]` float32 in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(p)) for p in pictures]).permute(0, 3, 1, 2).float() / 255


def crowd(seed: int, things: int = 9) -> np.ndarray:
    """`[64,64,3]` uint8, full of overlapping things of any colour.

    Most of a captioned picture is background; an autoencoder sees far more edges and colours in these.
    """
    rng, colours = np.random.default_rng(seed), list(PALETTE)
    canvas = Image.new("RGB", (PIXELS * 4,) * 2, PALETTE[rng.choice(colours)])
    draw = ImageDraw.Draw(canvas)
    for _ in range(things):
        x, y = rng.uniform(0, PIXELS, 2)
        shape = ALL_THINGS[rng.integers(len(ALL_THINGS))].shape
        draw_thing(draw, shape, PALETTE[rng.choice(colours)], x, y, rng.uniform(10, 28))
    return np.asarray(canvas.resize((PIXELS, PIXELS), Image.Resampling.BOX))


def crowds(n: int, seed: int) -> Tensor:
    """`[N,3,64,64]` uint8."""
    pictures = [crowd(seed * 1_000_003 + i) for i in tqdm(range(n), desc="crowds", mininterval=2.0)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def rendered(captions: list[str], seed: int, desc: str = "pictures") -> Tensor:
    """`[N,3,64,64]` uint8: one picture for each caption, placed by (seed, position in the list)."""
    pictures = [
        np.asarray(render(parse(c), [seed, i])) for i, c in enumerate(tqdm(captions, desc=desc, mininterval=2.0))
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
