"""What part of a picture is trained on, and at which size: squares, aspect-ratio buckets, crops and mirror images.

A frame is written as text, `512x768`, `512x768@0.25,0.5` or `512x768@0.5,0.5,mirrored`, and so it is a part of a
picture's name in the cache: the same picture in two frames is encoded twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_align import rng
from diffusion_align.data.images import decode_image
from diffusion_align.picture_size import sides

# Buckets have at least this fraction of the area of a picture of the resolution, and no more than its area.
_LEAST_AREA = 0.7
_LONGEST = 4.0  # sides differ at most by this factor
_FRAME = re.compile(r"(\d+)x(\d+)(?:@([\d.]+),([\d.]+)(,mirrored)?)?")


@dataclass(frozen=True)
class Frame:
    """width and height in pixels; x and y in [0, 1], where the crop lies between left and right, top and bottom."""

    width: int
    height: int
    x: float = 0.5
    y: float = 0.5
    mirrored: bool = False

    def __str__(self) -> str:
        centred = (self.x, self.y, self.mirrored) == (0.5, 0.5, False)
        return f"{self.width}x{self.height}" + (
            "" if centred else f"@{self.x:g},{self.y:g}{',mirrored' * self.mirrored}"
        )

    @classmethod
    def read(cls, text: str) -> Frame:
        """The frame of a text; ValueError if it is none."""
        if not (found := _FRAME.fullmatch(text)):
            raise ValueError(f"{text!r} is no frame of a picture")
        width, height, x, y, mirrored = found.groups()
        at = (0.5, 0.5) if x is None else (float(x), float(y))
        return cls(int(width), int(height), at[0], at[1], mirrored is not None)


@dataclass(frozen=True)
class Frames:
    """How the pictures of a data set are cropped; a list's pictures, such as the two of a pair, are cropped alike.

    Attributes:
        buckets: choose the shape by the pictures, with sides that are multiples of `step`; else all have that of the
            resolution.
        crops: how many crops at random places are kept of each picture; 0 keeps one in the middle.
        mirrored: keep each crop's mirror image too.
    """

    resolution: int | str
    buckets: bool = False
    step: int = 64
    crops: int = 0
    mirrored: bool = False

    @property
    def variants(self) -> int:
        """How many frames each list has; all have one shape."""
        return max(1, self.crops) * (2 if self.mirrored else 1)

    def of_list(self, sizes: Sequence[tuple[int, int] | None], seed: int, number: int) -> list[Frame]:
        """The frames of list `number`, whose pictures have these widths and heights (None: unknown)."""
        known = [size for size in sizes if size is not None]
        width, height = (
            best_bucket(known, self.resolution, self.step) if self.buckets and known else sides(self.resolution)
        )
        places = [(0.5, 0.5)]
        if self.crops:
            drawn = rng.uniform_batch(seed, "crop", [(number, i) for i in range(2 * self.crops)]).tolist()
            places = [(round(drawn[2 * i], 3), round(drawn[2 * i + 1], 3)) for i in range(self.crops)]
        frames = [Frame(width, height, x, y) for x, y in places]
        return frames + [replace(frame, mirrored=True) for frame in frames] if self.mirrored else frames


@lru_cache(maxsize=16)
def bucket_sizes(resolution: int | str, step: int) -> tuple[tuple[int, int], ...]:
    """The (width, height) of the buckets: multiples of `step` whose area is 0.7 to 1 times that of the resolution."""
    area = math.prod(sides(resolution))
    possible = range(step, int((area * _LONGEST) ** 0.5) + 1, step)
    return tuple(
        (width, height)
        for width in possible
        for height in possible
        if _LEAST_AREA * area <= width * height <= area and max(width, height) <= _LONGEST * min(width, height)
    )


def lost(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """The fraction of a picture's pixels outside of the largest crop that has the bucket's shape."""
    ratio = (size[0] * bucket[1]) / (size[1] * bucket[0])
    return 1 - min(ratio, 1 / ratio)


def best_bucket(sizes: Sequence[tuple[int, int]], resolution: int | str, step: int) -> tuple[int, int]:
    """The bucket in which the pictures (width, height) of a list lose the least: the one that loses most decides, then
    all together, then the bucket's area.

    Raises ValueError for a resolution that has no bucket, because the step is too large.
    """
    buckets = bucket_sizes(resolution, step)
    if not buckets:
        raise ValueError(f"resolution {resolution} has no bucket with sides that are multiples of {step}")

    def cost(bucket: tuple[int, int]) -> tuple[float, ...]:
        losses = [lost(size, bucket) for size in sizes]
        return round(max(losses), 9), round(sum(losses), 9), -bucket[0] * bucket[1], *bucket

    return min(buckets, key=cost)


def fit(image: Image.Image, frame: Frame) -> Tensor:
    """The largest crop of an RGB picture that has the frame's shape, resized -> float32 [3,height,width] in [0, 1].

    The crop is made inside the resize: a 10 x 10000 picture must not pass through a resolution x 1000 resolution one.
    """
    size = (frame.width, frame.height)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS, box=crop_box(image.size, frame))
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div_(255.0)
    return picture.flip(2) if frame.mirrored else picture


def load_picture(source: bytes | Path, frame: Frame | int) -> Tensor:
    """One picture, decoded and fitted to a frame, or to a square of that side; ImageError if it is broken."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    return fit(decode_image(data), Frame(frame, frame) if isinstance(frame, int) else frame)


def crop_box(size: tuple[int, int], frame: Frame) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the crop in the picture's own pixels."""
    width, height = size
    wide = min(width, height * frame.width / frame.height)
    high = min(height, width * frame.height / frame.width)
    left, top = (width - wide) * frame.x, (height - high) * frame.y
    return left, top, left + wide, top + high


def told_sizes(size: tuple[int, int], frame: Frame) -> list[int]:
    """What SDXL is told of a picture: original height and width; top and left of the crop, in the resized picture;
    height and width of the frame (Podell et al. 2023, arXiv 2307.01952, section 2.2)."""
    width, height = size
    left, top, right, bottom = crop_box(size, frame)
    scale = frame.width / (right - left)
    beside = (width - right if frame.mirrored else left) * scale
    return [height, width, round(top * scale), round(beside), frame.height, frame.width]
