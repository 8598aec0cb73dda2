"""Losses per example as pure functions of margins, log-ratios and rewards. They know neither models nor samplers."""

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

__all__ = [
    "beta_per_squared_error",
    "diffusion_dpo_margin",
    "hinge",
    "implicit_accuracy",
    "ipo",
    "logistic",
    "logistic_range",
    "robust",
]
