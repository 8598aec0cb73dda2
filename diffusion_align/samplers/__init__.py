"""Samplers: step tables, the kernel that computes one step, and rollouts, replays and gradients built on it."""

from .branch import branch
from .kernel import step_gaussian
from .one_pass import step_gradient
from .rollout import replay, rollout, sample
from .tables import StepTable, solver_table, step_table
from .threshold import dynamic_threshold
from .two_pass import path_gradient
from .window import noise_window

__all__ = [
    "StepTable",
    "branch",
    "dynamic_threshold",
    "noise_window",
    "path_gradient",
    "replay",
    "rollout",
    "sample",
    "solver_table",
    "step_gaussian",
    "step_gradient",
    "step_table",
]
