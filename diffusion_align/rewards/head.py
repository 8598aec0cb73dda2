"""The small head that LAION's aesthetic predictor and ImageReward share: five layers from 768 numbers to one.

768 -> 1024 -> 128 -> 64 -> 16 -> 1 without anything between them but dropout while they trained, so that it is an
affine map in five factors (christophschuhmann/improved-aesthetic-predictor, THUDM/ImageReward).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

WIDTHS = (768, 1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the layers in their Sequential; the others were dropout


def head_shapes(widths: tuple[int, ...] = WIDTHS) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a head's weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place, narrow, wide in zip(PLACES, widths[1:], widths[:-1], strict=True):
        shapes |= {f"layers.{place}.weight": (narrow, wide), f"layers.{place}.bias": (narrow,)}
    return shapes


def apply_head(weights: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Features [B,768] -> scores [B]."""
    for place in PLACES:
        features = F.linear(features, weights[f"layers.{place}.weight"], weights[f"layers.{place}.bias"])
    return features.squeeze(-1)
