"""Rewards, `(images [B,3,H,W] in [0, 1], prompts) -> [B]`: the same function trains and measures."""

from .answer import RewardError, one_each
from .clip import Reward, clip_scorer, to_uint8

__all__ = ["Reward", "RewardError", "clip_scorer", "one_each", "to_uint8"]
