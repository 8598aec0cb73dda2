"""The size of a picture's JPEG as a reward: needs no weights, and shows within minutes whether a method learns at all.

Compressibility and incompressibility of DDPO (Black et al. 2023, arXiv 2305.13301): kB (1000 bytes) at quality 95.
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from .pictures import Reward, of_levels, to_pil

QUALITY = 95


def jpeg_scorer(sign: float) -> Reward:
    """`sign` times the kilobytes of each picture's JPEG: -1 rewards plain pictures, 1 rewards busy ones."""

    def score(levels: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([sign * jpeg_bytes(picture) / 1000 for picture in to_pil(levels)])

    return of_levels(score)


def jpeg_bytes(picture: Image.Image) -> int:
    """Bytes of a Pillow picture as a JPEG, with Pillow's other settings as they are."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()
