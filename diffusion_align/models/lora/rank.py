"""The largest useful rank of a LoRA: the narrower side of the narrowest layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


class RankError(ValueError):
    """The rank is above the width of a layer; `largest` is the largest one that every layer can use."""

    def __init__(self, message: str, largest: int):
        super().__init__(message)
        self.largest = largest


def require_rank(shapes: Mapping[str, tuple[int, ...]], rank: int, targets: Sequence[str]) -> None:
    """Refuse a rank above the width of a layer that would get a LoRA, before tensors of that size exist.

    Args:
        shapes: names of the network's weights, "....weight", and their shapes [out, in, ...].
        targets: the ends of the layers' names.

    Raises:
        RankError: it names the narrowest layer.
    """
    ends = tuple(f"{start}{target}.weight" for target in targets for start in (".", ""))
    chosen = {name: shape for name, shape in shapes.items() if name.endswith(ends) and len(shape) > 1}
    widths = {name: min(shape[0], math.prod(shape[1:])) for name, shape in chosen.items()}
    if not widths or rank <= min(widths.values()):
        return
    narrow = min(widths, key=lambda name: widths[name])
    out, into = chosen[narrow][0], math.prod(chosen[narrow][1:])
    raise RankError(
        f"rank {rank} is above the width of {narrow.removesuffix('.weight')} ({into} to {out}), whose every change has "
        f"rank {widths[narrow]} or less",
        widths[narrow],
    )
