"""The door that every reward's answer passes, whoever asked: one number for each picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class RewardError(ValueError):
    """A reward did not answer with one number for each picture."""


def one_each(values: Any, count: int, name: str) -> Tensor:
    """The answer of `name` to `count` pictures, [count] float32 on the CPU without gradient.

    Raises RewardError, in one line, for anything but a tensor [count].
    """
    if not isinstance(values, Tensor) or tuple(values.shape) != (count,):
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(f"{name} returned {found} for {count} pictures: expected [{count}], one number each")
    return values.detach().float().cpu()
