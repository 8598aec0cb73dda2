"""How large a LoRA's rank can be: a layer's change has no more than its narrower side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def require_rank(shapes: Mapping[str, tuple[int, ...]], rank: int, targets: Sequence[str]) -> None:
    """Refuse a rank above the width of a layer that would get a LoRA, before there are tensors of that size.

    Args:
        shapes: names of the network's weights, "....weight", and their shapes [out, in, ...].
        targets: the ends of the layers' names.

    Raises:
        ValueError: naming the narrowest layer and the largest rank that says anything there.
    """
    ends = tuple(f"{start}{target}.weight" for target in targets for start in (".", ""))
    chosen = {name: shape for name, shape in shapes.items() if name.endswith(ends) and len(shape) > 1}
    widths = {name: min(shape[0], math.prod(shape[1:])) for name, shape in chosen.items()}
    if not widths or rank <= min(widths.values()):
        return
    narrow = min(widths, key=lambda name: widths[name])
    out, into = chosen[narrow][0], math.prod(chosen[narrow][1:])
    raise ValueError(
        f"rank {rank} is above the width of {narrow.removesuffix('.weight')} ({into} to {out}), whose every change has "
        f"rank {widths[narrow]} or less: give --rank {widths[narrow]} at most"
    )
