"""The parts of a Diffusion-DPO run, each built from what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from diffusion_align.commands.setup import optimizer_identity
from diffusion_align.objectives import hinge, ipo, logistic, robust
from diffusion_align.options import TrainDpo


def make_loss(loss_type: str, beta: float, label_smoothing: float) -> Callable[[Tensor], Tensor]:
    """The objective on a margin of squared errors summed over dims, beta bound."""
    return {
        "sigmoid": partial(logistic, beta=beta, label_smoothing=label_smoothing),
        "robust": partial(robust, beta=beta, flip=label_smoothing),
        "hinge": partial(hinge, beta=beta),
        # (beta margin - 1/2)^2: the same minimum as ipo's own, but free of the margin's unit, so that a learning rate
        # and a clip mean what they mean for the others. On errors summed over dims ipo's own scale is D^2.
        "ipo": lambda margin: beta**2 * ipo(margin, beta),
    }[loss_type]


def identity_of(
    o: TrainDpo, data_and_model: dict[str, Any], *, beta: float, batch: int, learning_rate: float, steps: int
) -> dict[str, Any]:
    """What a resumed run must share with the saved one. How a batch is cut into pieces and processes may change."""
    same = ("loss_type", "label_smoothing", "proportion_empty_prompts")
    own = {"beta": beta, "batch": batch, **{name: getattr(o, name) for name in same}}
    return {**data_and_model, **own, **optimizer_identity(o, learning_rate=learning_rate, steps=steps)}
