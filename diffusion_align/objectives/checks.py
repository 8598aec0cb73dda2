"""Checks that the objectives share."""

from __future__ import annotations

import math


def require_positive(**named: float) -> None:
    """Raise ValueError, naming the argument, unless each value is positive and finite."""
    for name, value in named.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def require_ratio_clip(clip: float) -> None:
    """Raise ValueError unless `clip` lies in (0, 1): it clamps a ratio, which is positive, to 1 - clip .. 1 + clip."""
    if not 0 < clip < 1:
        raise ValueError(f"clip must lie in (0, 1), got {clip}: ratios are clamped to 1 - clip .. 1 + clip")
