"""The size of pictures as people write it: one number for squares, or `768x512`, width x height."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d+)\s*[xX×,]\s*(\d+)")


def read_size(text: int | str) -> int | str:
    """A size in its one form: the side of a square as a number, else width x height; ValueError if it is none.

    `768,512` is kohya's spelling.
    """
    if isinstance(text, int) or not (found := _SIZE.fullmatch(text.strip())):
        return int(text)
    width, height = int(found[1]), int(found[2])
    return width if width == height else f"{width}x{height}"


def sides(size: int | str) -> tuple[int, int]:
    """Width and height in pixels of a size."""
    read = read_size(size)
    if isinstance(read, int):
        return read, read
    width, height = read.split("x")
    return int(width), int(height)


def require_multiples(size: int | str, step: int) -> tuple[int, int]:
    """Width and height of a size; ValueError, with the nearest that are possible, unless both are multiples of `step`,
    which the VAE reduces and the UNet halves evenly."""
    both = sides(size)
    if all(side > 0 and side % step == 0 for side in both):
        return both
    below = [max(side // step, 1) * step for side in both]
    above = [max(-(-side // step), 1) * step for side in both]
    near = dict.fromkeys(str(read_size(f"{width}x{height}")) for width, height in (below, above))
    raise ValueError(
        f"resolution {size} is not a positive multiple of {step}, which this model's VAE and UNet need: "
        f"use {' or '.join(near)}"
    )
