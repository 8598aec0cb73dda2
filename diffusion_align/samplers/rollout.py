"""Trajectories of a sampler, and their log-probs under another denoiser.

A trajectory follows a step table: the clean prediction at a state (and one or two before it, for higher orders) gives a
Gaussian, and a draw from it the next state. The last step to sigma = 0 has no density, so it is never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..gaussian import Gaussian
from ..prediction import Denoiser
from ..rng import draw_normal
from ..tensors import widen
from ..trajectory import Trajectory
from .kernel import step_gaussian
from .tables import StepTable

Generators = torch.Generator | Sequence[torch.Generator]
HISTORIES = ("recompute", "frozen")
Measure = Callable[[int, Gaussian, Tensor], Tensor]
"""`(k, step, next state [B,...]) -> [B]`: one number per sample for a reverse step."""


def log_prob(k: int, step: Gaussian, x: Tensor) -> Tensor:
    """The default measure of a step: log-density of the next state, [B] nats."""
    return step.log_prob(x)


def predict(denoiser: Denoiser, table: StepTable, k: int, x: Tensor) -> Tensor:
    """The clean prediction at the state before step `k`, [B,...], float32 at least."""
    x = widen(x)
    return widen(denoiser(x, table.gather("timesteps", k, x)))


def earlier(table: StepTable, k: int, clean: Mapping[int, Tensor] | Sequence[Tensor] | Tensor) -> list[Tensor]:
    """The earlier clean predictions that step `k` needs, newest first: one less than its order."""
    return [clean[k - back] for back in range(1, int(table.order[k]))]


def draw_noise(generator: Generators | None, like: Tensor) -> Tensor:
    """Standard normal [B,...] in the dtype of `like`, float32 at least: one generator for all, or one per sample.

    With one per sample, the noise of a sample does not depend on the rest of the batch. Raises ValueError for a wrong
    number of generators.
    """
    dtype = widen(like[:0]).dtype
    if generator is None:
        raise ValueError("this table has stochastic steps: give a torch.Generator, or a list with one per sample")
    if isinstance(generator, torch.Generator):
        return draw_normal(like.shape, generator, dtype).to(like.device)
    if len(generator) != like.shape[0]:
        raise ValueError(f"got {len(generator)} generators for {like.shape[0]} samples: give one, or one per sample")
    return torch.stack([draw_normal(like.shape[1:], source, dtype) for source in generator]).to(like.device)


def _walk(
    denoiser: Denoiser,
    table: StepTable,
    x: Tensor,
    generator: Generators | None,
    threshold: Callable[[Tensor], Tensor] | None,
):
    """Yield (clean prediction, Gaussian or None, next state) for each step. Keeps two predictions and one state."""
    clean: dict[int, Tensor] = {}
    for k in range(len(table)):
        clean[k] = predict(denoiser, table, k, x)
        if threshold is not None:
            clean[k] = threshold(clean[k])
        mean, std = step_gaussian(table, k, widen(x), clean[k], *earlier(table, k, clean))
        step = Gaussian(mean, std) if table.stochastic[k] else None
        # The state is rounded to its storage dtype before the next step uses it, so that stored states can be replayed.
        x = (mean if step is None else step.sample(draw_noise(generator, x))).to(x.dtype)
        clean.pop(k - 2, None)
        yield clean[k], step, x


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    table: StepTable,
    x_T: Tensor,
    generator: Generators | None,
    *,
    threshold: Callable[[Tensor], Tensor] | None = None,
) -> Trajectory[StepTable]:
    """Run the sampler from noise `x_T` [B,...] without gradients and record it.

    States are stored, fed back and scored in the dtype of `x_T`; arithmetic is in float32 at least. `log_prob` [T,B] is
    in nats, summed over dims, and 0 at steps without noise. `generator` is one torch.Generator, or a list of B so that
    no sample depends on the rest of the batch; None for a table without stochastic steps. `threshold` maps each clean
    prediction before it is used (`dynamic_threshold`, pixels only); to score such a trajectory again, bind the same map
    into the denoiser.
    """
    states, log_prob, predictions = [x_T], [], []
    for clean, step, x in _walk(denoiser, table, x_T, generator, threshold):
        log_prob.append(clean.new_zeros(clean.shape[0]) if step is None else step.log_prob(widen(x)))
        states.append(x)
        predictions.append(clean)
    return Trajectory(torch.stack(states), torch.stack(log_prob), table, clean=torch.stack(predictions))


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    table: StepTable,
    x_T: Tensor,
    generator: Generators | None = None,
    *,
    threshold: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The last state [B,...] of the trajectory that `rollout` would record, without storing the others."""
    end = x_T
    for _, _, state in _walk(denoiser, table, x_T, generator, threshold):
        end = state
    return end


def scored_predictions(trajectory: Trajectory[StepTable], history_from: str) -> list[int]:
    """The steps whose clean prediction enters a log-prob: stochastic ones and, if recomputed, those in their history.

    Raises ValueError for an unknown history, for frozen history without stored predictions, and if no step has a
    density.
    """
    table = trajectory.table
    if history_from not in HISTORIES:
        raise ValueError(f"unknown history {history_from!r}: expected one of {', '.join(HISTORIES)}")
    if history_from == "frozen" and trajectory.clean is None:
        raise ValueError("frozen history needs the clean predictions of the trajectory, but trajectory.clean is None")
    scored = [k for k in range(len(table)) if table.stochastic[k]]
    if not scored:
        raise ValueError(
            "no step of this table is stochastic, so the trajectory has no log-probs: build the table with eta > 0"
        )
    behind = [k - back for k in scored for back in range(1, int(table.order[k]))] if history_from == "recompute" else []
    return sorted({*scored, *behind})


def path_log_prob(
    trajectory: Trajectory[StepTable], clean: Mapping[int, Tensor], history_from: str, measure: Measure = log_prob
) -> Tensor:
    """Log-probs [T,B] in nats of the stored states, from given clean predictions, without calling a network.

    `measure` replaces the log-prob by another number; steps without noise give 0.
    """
    table, states = trajectory.table, trajectory.states
    past = clean if history_from == "recompute" or trajectory.clean is None else trajectory.clean
    any_clean = next(iter(clean.values()))
    rows = []
    for k in range(len(table)):
        if table.stochastic[k]:
            step = Gaussian(*step_gaussian(table, k, widen(states[k]), clean[k], *earlier(table, k, past)))
            rows.append(measure(k, step, widen(states[k + 1])))
        else:
            rows.append(any_clean.new_zeros(states.shape[1]))
    return torch.stack(rows)


def replay(denoiser: Denoiser, trajectory: Trajectory[StepTable], *, history: str = "recompute") -> Tensor:
    """Log-probs [T,B] in nats of a stored trajectory under `denoiser`, differentiable; 0 at steps without noise.

    Under the denoiser that ran, they equal `trajectory.log_prob`. At second order the density of a step depends on two
    clean predictions: "recompute" takes both from `denoiser`, with gradient through both, which is the density of the
    sampler; "frozen" takes the earlier one from `trajectory.clean`, which has the same value under the denoiser that
    ran but another gradient. All network graphs are in memory at once: for long trajectories use `path_gradient`.
    Raises ValueError as listed in `scored_predictions`.
    """
    needed = scored_predictions(trajectory, history)
    clean = {k: predict(denoiser, trajectory.table, k, trajectory.states[k]) for k in needed}
    return path_log_prob(trajectory, clean, history)
