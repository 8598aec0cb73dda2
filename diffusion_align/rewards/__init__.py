"""Rewards, `(images [B,3,H,W] in [0, 1], prompts) -> [B]`: the same function trains and measures.

Names load lazily, so that the command can know rewards by name (`catalogue`, `spec`) without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answer import RewardError, one_each
    from .background import prefetch
    from .clip import clip_scorer
    from .combine import smallest, standardised, weighted_sum
    from .load import load_reward
    from .pictures import Reward, to_uint8
    from .remote import http_reward

_ROOMS = {
    "answer": ("RewardError", "one_each"),
    "clip": ("clip_scorer",),
    "combine": ("smallest", "standardised", "weighted_sum"),
    "load": ("load_reward",),
    "pictures": ("Reward", "to_uint8"),
    "background": ("prefetch",),
    "remote": ("http_reward",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Reward",
    "RewardError",
    "clip_scorer",
    "http_reward",
    "load_reward",
    "one_each",
    "prefetch",
    "smallest",
    "standardised",
    "to_uint8",
    "weighted_sum",
]


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
