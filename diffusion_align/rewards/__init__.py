"""Rewards, `(images [B,3,H,W] in [0, 1], prompts) -> [B]`: the same function trains and measures.

Names load lazily, so that the command line reads a reward's text (`catalogue`, `spec`) without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..system.background import prefetch
    from .clip import clip_scorer
    from .interface import Reward, RewardError, one_each, smallest, standardised, to_uint8, weighted_sum
    from .load import load_reward
    from .remote import http_reward
    from .spec import RewardSpec, read_spec

_MODULE_OF = {
    "clip_scorer": "clip",
    "http_reward": "remote",
    "load_reward": "load",
    "prefetch": ".system.background",
    "read_spec": "spec",
    "RewardSpec": "spec",
}

__all__ = [
    "Reward",
    "RewardError",
    "RewardSpec",
    "clip_scorer",
    "http_reward",
    "load_reward",
    "one_each",
    "prefetch",
    "read_spec",
    "smallest",
    "standardised",
    "to_uint8",
    "weighted_sum",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF.get(name, 'interface')}", __name__), name)
