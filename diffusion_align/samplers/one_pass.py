"""Exact gradients of losses that are sums over steps: one forward and one backward pass of the network per step.

The loss of step k depends only on the Gaussian of that step. At order 1 each step is differentiated immediately. At
order 2 the Gaussian also depends on the clean prediction of the step before. So a prediction is kept, with its graph,
until no later step uses it, and is differentiated then. At most `order` network graphs are in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..gaussian import Gaussian
from ..prediction import Denoiser
from ..tensors import widen
from ..trajectory import Trajectory
from .kernel import step_gaussian
from .rollout import earlier, predict, scored_predictions
from .tables import StepTable

StepLoss = Callable[[int, Gaussian], Tensor]
"""`(k, step) -> scalar`: the loss of step k, a function of that step's Gaussian [B] alone."""


@torch.enable_grad()
def step_gradient(
    denoiser: Denoiser, trajectory: Trajectory[StepTable], loss: StepLoss, *, history: str = "recompute"
) -> Tensor:
    """Add the gradient of `sum_k loss(k, step_k)` over the stochastic steps to the `.grad` of the parameters.

    `loss` is called once for each step, in order along the stored states; scale it there for gradient accumulation.
    `history` as in `replay`. The gradient is that of `path_gradient`, with half of its forward passes, for losses of
    this form (D3PO, SPO, DDPO, a KL penalty).

    Returns the sum, detached. Raises ValueError if a loss is not a scalar, if nothing in the denoiser requires a
    gradient, and as listed in `scored_predictions`.
    """
    needed = set(scored_predictions(trajectory, history))
    table, states = trajectory.table, trajectory.states
    alive: dict[int, tuple[Tensor, Tensor]] = {}  # k -> the prediction with its graph, and a leaf that collects dL/dm
    total = states.new_zeros((), dtype=widen(states[:0]).dtype)
    for k in range(len(table)):
        if k in needed:
            clean = predict(denoiser, table, k, states[k])
            if not clean.requires_grad:
                raise ValueError("nothing in the denoiser requires a gradient: there is nothing to train")
            alive[k] = (clean, clean.detach().requires_grad_())
        if table.stochastic[k]:
            past = {j: leaf for j, (_, leaf) in alive.items()}
            behind = earlier(table, k, past if history == "recompute" or trajectory.clean is None else trajectory.clean)
            value = loss(k, Gaussian(*step_gaussian(table, k, widen(states[k]), past[k], *behind)))
            if value.ndim != 0:
                raise ValueError(f"the loss of a step must be a scalar, got {list(value.shape)}")
            if value.requires_grad:
                value.backward()
            total = total + value.detach().to(total)
        for j in [j for j in alive if not _looked_back_at(table, j, k)]:
            clean, leaf = alive.pop(j)
            # Also without a gradient: all ranks must make the same calls.
            clean.backward(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    return total


def _looked_back_at(table: StepTable, j: int, k: int) -> bool:
    """Whether a step after k still uses the prediction of step j."""
    return any(j > later - int(table.order[later]) for later in range(k + 1, min(k + 3, len(table))))
