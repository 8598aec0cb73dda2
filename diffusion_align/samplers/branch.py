"""Several children of one state, for step-wise preference methods."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..gaussian import Gaussian
from ..prediction import Denoiser
from ..tensors import widen
from .kernel import step_gaussian
from .rollout import Generators, draw_noise, predict
from .tables import StepTable


class Branch(NamedTuple):
    """`children` [K,B,...] drawn from one `step` Gaussian per sample; `clean` [B,...] predicted at the parent."""

    children: Tensor
    step: Gaussian
    clean: Tensor


@torch.no_grad()
def branch(
    denoiser: Denoiser,
    table: StepTable,
    k: int,
    x: Tensor,
    children: int,
    generator: Generators,
    previous: Tensor | None = None,
    clean: Tensor | None = None,
) -> Branch:
    """Draw `children` next states from each state of `x` [B,...] at step `k` (Liang et al. 2024, arXiv 2406.04314).

    `previous` [B,...] is the clean prediction of the step before, needed at order 2 (the `clean` of the step taken
    there). `clean` [B,...] is the clean prediction at `x`, if it is known: the denoiser is then not called.
    Children are drawn one after another, so the first ones do not depend on how many follow; with a list of B
    generators they do not depend on batch mates either. They have the dtype of `x`. Raises ValueError at a
    step without noise, where all children would be the same, or for fewer than one child.
    """
    if not table.stochastic[k]:
        raise ValueError(f"step {k} has no noise: its children would all be the same")
    if children < 1:
        raise ValueError(f"expected at least one child, got {children}")
    if clean is None:
        clean = predict(denoiser, table, k, x)
    step = Gaussian(*step_gaussian(table, k, widen(x), clean, previous))
    drawn = [step.sample(draw_noise(generator, x)).to(x.dtype) for _ in range(children)]
    return Branch(torch.stack(drawn), step, clean)
