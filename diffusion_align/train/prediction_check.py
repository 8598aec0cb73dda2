"""Does a network predict what its scheduler says? Its output at a high noise level tells epsilon from v.

There the noisy latents are almost the noise, so a network that predicts epsilon nearly copies its input, and one that
predicts v puts out nearly minus the picture. Each explains one target and is far from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.prediction import add_noise, target
from diffusion_align.rng import normal
from diffusion_align.schedule import Schedule

KINDS = ("epsilon", "v_prediction")
LEVEL = 0.9  # of all timesteps
NOTHING = 1.0  # the error of a network that always puts out 0
EXPLAINED, TIMES = 0.5, 3.0
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contradiction:
    """What the scheduler says, what the network predicts, and the error under each, as a fraction of the target."""

    said: str
    found: str
    errors: dict[str, float]
    timestep: int


@torch.no_grad()
def prediction_errors(
    predict: Predict, schedule: Schedule, latents: Sequence[Tensor], text: Tensor, seed: int
) -> tuple[dict[str, float], int]:
    """Squared error of the network's output under each kind over the target's own size, and the timestep.

    `latents` are [C,h,w] each, of any size, and the network sees one at a time.
    """
    t = int(LEVEL * (schedule.num_timesteps - 1))
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    missed, size = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for i, one in enumerate(latents):
        clean = one[None].float().cpu()
        noise = normal(clean.shape, seed, "prediction check", i)
        output = predict(add_noise(clean, noise, alpha, sigma), torch.tensor([t]), text[i : i + 1]).float().cpu()
        for kind in KINDS:
            due = target(clean, noise, alpha, sigma, kind)
            missed[kind] += float((output - due).square().sum())
            size[kind] += float(due.square().sum())
    return {kind: missed[kind] / size[kind] for kind in KINDS}, t


def contradiction(
    predict: Predict, schedule: Schedule, latents: Sequence[Tensor], text: Tensor, seed: int = 0
) -> Contradiction | None:
    """How the network contradicts its schedule; None if it does not, or if its output decides nothing.

    The output must be worse than none under the kind that the schedule names, and explain the other one. An untrained
    network does neither.
    """
    if schedule.kind != "vp" or schedule.prediction_type not in KINDS:
        return None
    errors, t = prediction_errors(predict, schedule, latents, text, seed)
    said = schedule.prediction_type
    (other,) = set(KINDS) - {said}
    if errors[said] > NOTHING and errors[other] < EXPLAINED and errors[said] > TIMES * errors[other]:
        return Contradiction(said, other, errors, t)
    return None
