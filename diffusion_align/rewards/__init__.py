"""Rewards, `(images [B,3,H,W] in [0, 1], prompts) -> [B]`: the same function trains and measures."""

from .clip import Reward, clip_scorer, to_uint8

__all__ = ["Reward", "clip_scorer", "to_uint8"]
