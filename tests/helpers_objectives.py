"""Numbers for the tests of the objectives, and a sampler small enough to be enumerated.

The **chain** runs x_T -> x_1 -> x_0 over three states each. A policy is two tables of logits, [2,3,3]: the first step's
rows are x_T, the second's x_1. All 27 runs can be written down, so every expectation here is exact.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

STATES = 3
PATHS = torch.tensor(list(product(range(STATES), repeat=3)))  # [27,3]: x_T, x_1, x_0; those of one x_T lie together


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), inputs, retain_graph=True))


def step_log_prob(logits: Tensor) -> Tensor:
    """[2,3,3] -> [27,2], the log-probability of both steps of each run."""
    log_prob = logits.log_softmax(2)
    return torch.stack([log_prob[0][PATHS[:, 0], PATHS[:, 1]], log_prob[1][PATHS[:, 1], PATHS[:, 2]]], 1)


def run_prob(logits: Tensor, start: Tensor) -> Tensor:
    """[27]: how likely each run is when x_T is drawn from `start` [3]."""
    return start[PATHS[:, 0]] * step_log_prob(logits).sum(1).exp()


def expected_reward(logits: Tensor, start: Tensor, reward: Tensor) -> Tensor:
    """`reward` [3] of x_0, averaged over runs."""
    return (run_prob(logits, start) * reward[PATHS[:, 2]]).sum()
