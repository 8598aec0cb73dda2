"""The layers that a LoRA may have, and the largest useful rank: the narrower side of the narrowest of them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence


class RankError(ValueError):
    """The rank is above the width of a layer; `largest` is the largest one that every layer can use."""

    def __init__(self, message: str, largest: int):
        super().__init__(message)
        self.largest = largest


def require_layers(shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> None:
    """Raise ValueError for a name that no linear layer and no convolution of the network ends with.

    `shapes`: as for `require_rank`.
    """
    weights = [key for key, shape in shapes.items() if key.endswith(".weight") and len(shape) > 1]
    parts = [key.removesuffix(".weight").split(".") for key in weights]
    ends = sorted({".".join(words[-count:]) for words in parts for count in (1, 2) if not words[-count:][0].isdigit()})
    for name in names:
        if not any(f".{key}".endswith(f".{name}.weight") for key in weights):
            near = difflib.get_close_matches(name, ends, 3, 0.5)
            hint = f"; similar are {', '.join(near)}" if near else ""
            raise ValueError(f"no linear layer and no convolution of the UNet is named {name}{hint}")


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
