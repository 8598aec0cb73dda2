"""Exact gradients of any loss of a trajectory, with one network graph in memory.

A loss of a trajectory is a function of its clean predictions. Pass 1 evaluates them without gradients, makes them
leaves, and differentiates only the solver's algebra and the loss: this gives dL/dm for each prediction m. Pass 2 runs
the network again, one step at a time, and back-propagates that vector. By the chain rule the sum over steps is exactly
the full gradient. Memory grows by a few latents per step; the cost is one forward pass more than full autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ..prediction import Denoiser
from ..tensors import widen
from ..trajectory import Trajectory
from .rollout import Measure, log_prob, path_log_prob, predict, scored_predictions
from .tables import StepTable


@torch.no_grad()
def relative_change(table: StepTable, k: int, x: Tensor, first: Tensor, second: Tensor) -> float:
    """The distance of two clean predictions at the state `x` before step k, in norms over the whole batch.

    It is relative to |clean| + |noise| sigma / alpha. A clean prediction is the difference of x / alpha and of the
    predicted noise, so near t = 1000 it has the rounding errors of those, although it is much smaller.
    """
    alpha = float(table.alpha[k])
    size = vector_norm(first) + (vector_norm(x - alpha * first) / alpha if alpha else 0)
    return float(vector_norm(second - first) / size) if bool((second != first).any()) else 0.0


def _require_same(change: float, k: int, tolerance: float) -> bool:
    """Raise RuntimeError for a larger change; False for one that is not finite, which is not checked."""
    if not math.isfinite(change):
        return False
    if change > tolerance:
        raise RuntimeError(
            f"the two passes of the denoiser differ at step {k}, by {change:.1e} relative, and rounding explains "
            f"{tolerance:.1e}: the gradient would be wrong. Switch off dropout and anything else random, and do not "
            "change the weights or the size of the batch in between"
        )
    return True


@torch.enable_grad()
def path_gradient(
    denoiser: Denoiser,
    trajectory: Trajectory[StepTable],
    loss: Callable[[Tensor], Tensor],
    *,
    history: str = "recompute",
    measure: Measure = log_prob,
    known: Tensor | None = None,
    tolerance: float = 1e-4,
) -> Tensor:
    """Add the gradient of `loss(replay(denoiser, trajectory))` to the `.grad` of the denoiser's parameters.

    `loss` maps log-probs [T,B] (nats, 0 at steps without noise) to a scalar, and may depend on the parameters only
    through them; scale it there for gradient accumulation. `history` as in `replay`. The network runs twice at each
    scored step, in order, and once backward; predictions of the two passes may differ by `tolerance` (relative, see
    `relative_change`), for kernels that are not deterministic.

    `measure(k, step, next_state) -> [B]` replaces the log-prob by another number of a step, such as its log-ratio to a
    reference, which has no cancellation. `known` [T,B,...]: the clean predictions of the current denoiser
    (`trajectory.clean`, if nothing was updated since it was drawn). They replace the first pass, and the check that
    both passes agree becomes the check that the importance ratio is 1 before the first update.

    If a prediction is not finite, the gradient is nan. Returns the loss, detached. Raises ValueError if the loss is not
    a scalar or does not depend on the log-probs, if nothing in the denoiser requires a gradient, and as listed in
    `scored_predictions`; RuntimeError if the passes disagree (the gradients of earlier steps are then already added).
    """
    needed = scored_predictions(trajectory, history)
    table, states = trajectory.table, trajectory.states
    with torch.no_grad():
        first = {k: predict(denoiser, table, k, states[k]) if known is None else widen(known[k]) for k in needed}
    leaves = {k: clean.detach().clone().requires_grad_() for k, clean in first.items()}
    value = loss(path_log_prob(trajectory, leaves, history, measure))
    if value.ndim != 0:
        raise ValueError(f"the loss must be a scalar, got {list(value.shape)}: reduce it over steps and batch")
    if not value.requires_grad:
        raise ValueError("the loss does not depend on the log-probs it was given (is it detached?)")
    vectors = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)

    for k, vector in zip(needed, vectors, strict=True):
        # Also if the vector is 0 (a clipped step): all ranks must make the same calls.
        clean = predict(denoiser, table, k, states[k])
        if not clean.requires_grad:
            raise ValueError("nothing in the denoiser requires a gradient: there is nothing to train")
        # If the predictions are not finite, the gradient is nan, so that the optimizer step is skipped.
        change = relative_change(table, k, widen(states[k]), first[k], clean)
        clean.backward(vector if _require_same(change, k, tolerance) else torch.full_like(vector, torch.nan))
    return value.detach()
