"""The reverse step of all samplers: a Gaussian whose mean is linear in the state and the clean predictions."""

from __future__ import annotations

import torch

from ..tensors import expand_to, require_same_shape, widen
from .tables import StepTable


def step_gaussian(
    table: StepTable,
    k: int | torch.Tensor,
    x: torch.Tensor,
    clean: torch.Tensor,
    previous: torch.Tensor | None = None,
    before: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [B,...] and standard deviation [B] of the next state.

        mean = cx x + c0 clean + c1 previous + c2 before

    `k` is the step, one for all samples or [B] integers, so a batch may mix steps in any order. `x` [B,...] is the
    state before the step, `clean` the clean prediction there, `previous` and `before` those of the one and two steps
    before (Lu et al. 2022, arXiv 2211.01095, algorithm 2). Samples whose step uses less history ignore it.

    Half-precision inputs are computed, and returned, in float32; float64 stays. std is 0 at a step without noise, which
    has no density. Raises ValueError if a step needs history that is not given, or for unequal shapes; IndexError for a
    step outside the table.
    """
    k = table.indices(k, x.shape[0])
    needed = int(table.order[k].max()) if len(k) else 1
    history = {"clean": clean, "previous": previous, "before": before}
    given = {name: widen(value) for name, value in list(history.items())[:needed] if value is not None}
    if len(given) < needed:
        step = int(k[table.order[k].argmax()])
        raise ValueError(
            f"step {step} is of order {needed} and also needs the clean predictions of the {needed - 1} step(s) before "
            "it (previous, before): take the steps in order, as replay does, or build the table with order=1"
        )
    require_same_shape(x=x, **given)
    state = widen(x)
    weights = table.gather("c", k, state)
    mean = expand_to(table.gather("cx", k, state), state) * state
    for j, prediction in enumerate(given.values()):
        mean = mean + expand_to(weights[:, j], state) * prediction
    return mean, table.gather("std", k, state)
