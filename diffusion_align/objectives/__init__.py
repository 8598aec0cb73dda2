"""Losses per example as pure functions of margins, log-ratios and rewards, independent of models and samplers."""

from .policy_gradient import group_advantage, ppo_clip
from .preference import (
    beta_per_squared_error,
    diffusion_dpo_margin,
    hinge,
    implicit_accuracy,
    ipo,
    logistic,
    logistic_range,
    robust,
)
from .ranking import gain_weights, rank_dpo
from .regression import prdp, prdp_clip_fraction
from .selection import best_and_worst, clear_win, ordered_pairs, pareto, softmax_gap, win_counts
from .stepwise import clamped, d3po, spo, stepwise_range
from .variants import dspo, kto, mapo, scale_gradient, sdpo_scale

__all__ = [
    "best_and_worst",
    "beta_per_squared_error",
    "clamped",
    "clear_win",
    "d3po",
    "diffusion_dpo_margin",
    "dspo",
    "gain_weights",
    "group_advantage",
    "hinge",
    "implicit_accuracy",
    "ipo",
    "kto",
    "logistic",
    "logistic_range",
    "mapo",
    "ordered_pairs",
    "pareto",
    "ppo_clip",
    "prdp",
    "prdp_clip_fraction",
    "rank_dpo",
    "robust",
    "scale_gradient",
    "sdpo_scale",
    "softmax_gap",
    "spo",
    "stepwise_range",
    "win_counts",
]
