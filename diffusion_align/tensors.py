"""Shape helpers, and the meaning of the shape letters in all docstrings.

B batch, K list or children, T steps, L tokens, E text width, D dims, M mixture parts, `...` the remaining dims of one
sample.
"""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """The same values in float32 at least; float64 stays float64. Half precision is too coarse for sums of nats."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand_to(v: Tensor, like: Tensor) -> Tensor:
    """`v` [B] with singleton dims appended, [B,1,...,1], so that it multiplies `like` [B,...] sample by sample.

    Raises ValueError if `v` is not one number per sample of `like`; [B] and [B,1] would broadcast silently.
    """
    if v.ndim != 1 or like.ndim < 1 or v.shape[0] != like.shape[0]:
        raise ValueError(
            f"expected one value per sample, [B] against [B,...], got {list(v.shape)} against {list(like.shape)}"
        )
    return v.reshape(-1, *[1] * (like.ndim - 1))


def sum_dims(x: Tensor) -> Tensor:
    """Sum over all dims of a sample, [B,...] -> [B], in float32 at least (float64 stays float64)."""
    if x.ndim == 0:
        raise ValueError("expected a batch [B,...], got a scalar")
    return widen(x) if x.ndim == 1 else widen(x).flatten(1).sum(1)


def require_same_shape(**named: Tensor) -> None:
    """Raise ValueError, naming both tensors, unless all have one shape, so that nothing broadcasts by accident."""
    items = list(named.items())
    for name, tensor in items[1:]:
        if tensor.shape != items[0][1].shape:
            raise ValueError(
                f"{items[0][0]} is {list(items[0][1].shape)} but {name} is {list(tensor.shape)}: shapes must be equal"
            )
