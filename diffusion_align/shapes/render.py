"""Draws captions: 64x64 pictures of flat shapes on a flat background, at random positions that fit the caption."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .caption import Caption

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "cyan": (50, 200, 220),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "white": (240, 240, 240),
}
PIXELS = 64
DIAMETERS = {"small": (12.0, 15.0), "large": (22.0, 26.0)}  # in pixels; the judge's threshold is between the two
GAP = 4.0  # free pixels between two things, and half of it to the border
OVERSAMPLE = 4


def _place(caption: Caption, rng: np.random.Generator) -> list[tuple[float, float, float]] | None:
    """One try at (x, y, diameter) for each thing; None if they touch or the relation is ambiguous."""
    placed: list[tuple[float, float, float]] = []
    for thing in caption.things:
        diameter = rng.uniform(*DIAMETERS[thing.size])
        low, high = (diameter + GAP) / 2, PIXELS - (diameter + GAP) / 2
        x, y = rng.uniform(low, high, 2)
        # Bounding boxes must be apart, not circles, so that the corners of squares do not touch.
        if any(max(abs(x - u), abs(y - v)) < (diameter + d) / 2 + GAP for u, v, d in placed):
            return None
        placed.append((x, y, diameter))
    if caption.relation:
        (x0, y0, _), (x1, y1, _) = placed
        along, across = (x1 - x0, y1 - y0) if caption.relation in ("left of", "right of") else (y1 - y0, x1 - x0)
        if caption.relation in ("right of", "below"):
            along = -along
        if along < 1.3 * abs(across):
            return None
    return placed


def _outline(shape: str, x: float, y: float, diameter: float) -> list[tuple[float, float]]:
    """Corners of the shape's polygon, in oversampled pixels."""
    if shape == "square":
        unit = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "triangle":
        unit = [(0, -1), (1, 1), (-1, 1)]
    else:  # a cross whose arms are a third of its width
        a = 1 / 3
        quarter = [(-a, -1), (a, -1), (a, -a)]
        unit = []
        for _ in range(4):
            unit += quarter
            quarter = [(-v, u) for u, v in quarter]
    return [((x + u * diameter / 2) * OVERSAMPLE, (y + v * diameter / 2) * OVERSAMPLE) for u, v in unit]


def draw_thing(
    draw: ImageDraw.ImageDraw, shape: str, fill: tuple[int, int, int], x: float, y: float, diameter: float
) -> None:
    """Draw one shape on an oversampled canvas; centre and diameter are in pixels of the finished picture."""
    if shape == "circle":
        draw.ellipse([(c + s * diameter / 2) * OVERSAMPLE for s in (-1, 1) for c in (x, y)], fill=fill)
    else:
        draw.polygon(_outline(shape, x, y, diameter), fill=fill)


def render(caption: Caption, seed: int | np.random.Generator) -> Image.Image:
    """A 64x64 RGB picture for which the caption holds.

    `seed` chooses positions and exact sizes; drawn at four times the size and averaged down, so edges are smooth.
    """
    rng = np.random.default_rng(seed)
    placed = _place(caption, rng)
    while placed is None:
        placed = _place(caption, rng)
    canvas = Image.new("RGB", (PIXELS * OVERSAMPLE, PIXELS * OVERSAMPLE), PALETTE[caption.background])
    draw = ImageDraw.Draw(canvas)
    for thing, (x, y, diameter) in zip(caption.things, placed, strict=True):
        draw_thing(draw, thing.shape, PALETTE[thing.colour], x, y, diameter)
    return canvas.resize((PIXELS, PIXELS), Image.Resampling.BOX)
