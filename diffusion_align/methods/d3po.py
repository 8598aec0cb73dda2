"""`train d3po`: D3PO (Yang et al. 2023, arXiv 2311.13231) on all pairs of a prompt's runs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from diffusion_align.gaussian import Gaussian
from diffusion_align.methods.entry import Entry
from diffusion_align.methods.shared.metrics import RunSums
from diffusion_align.methods.shared.online_setup import (
    OnlineSetup,
    describe_clamp,
    online_length,
    start_with,
)
from diffusion_align.methods.shared.rollout_plan import RunTables, evaluations_of_runs
from diffusion_align.methods.shared.rollouts import Rollouts, method_on_runs
from diffusion_align.methods.shared.runs import Bind, Runs
from diffusion_align.objectives import clamped, d3po, ordered_pairs
from diffusion_align.options import TrainD3po
from diffusion_align.samplers import step_gradient
from diffusion_align.train.method import Columns, OnlineMethod


def d3po_method(rollouts: Rollouts[Runs], *, beta: float, clip: float | None, per_dim: bool) -> OnlineMethod[Runs]:
    """D3PO on all pairs of a prompt's runs. Constants as in `objectives.d3po`; `per_dim` as in `learn_d3po`."""

    def learn(runs: Runs, factor: float) -> Columns:
        return learn_d3po(runs, rollouts.policy, factor, beta=beta, clip=clip, per_dim=per_dim)

    return method_on_runs(rollouts, learn, items=lambda runs: len(pairs_of(runs)[0]))


def pairs_of(runs: Runs) -> tuple[Tensor, Tensor]:
    """Row numbers [M] of winners and of losers: every pair of a group with a preference (a nan reward has none)."""
    group, winner, loser = ordered_pairs(runs.reward)
    size = runs.reward.shape[1]
    return group * size + winner, group * size + loser


def learn_d3po(
    runs: Runs, policy: Bind, factor: float, *, beta: float, clip: float | None, per_dim: bool = True
) -> Columns:
    """Add the gradient of factor x the sum over pairs of D3PO's loss, averaged over steps; columns of the M pairs.

    `per_dim`: beta and clip are for log-ratios averaged over dims, as published; otherwise for nats. Columns: loss;
    log_ratio_w, log_ratio_l and kl_w, kl_l, sums over the trajectory in nats; clamped_w, clamped_l, fractions of the
    steps; drift, the largest |log-ratio| of a step, in nats, to the policy that drew it.
    """
    winner, loser = (rows.to(runs.text.device) for rows in pairs_of(runs))
    sums = RunSums(runs)
    unit = runs.dims if per_dim else 1
    losses = torch.zeros(len(winner), device=winner.device)

    def loss(k: int, step: Gaussian) -> Tensor:
        ratio = sums.add(k, step)[0] / unit
        sums.clamped += clamped(ratio, clip) / sums.steps
        of_pairs = d3po(ratio[winner], ratio[loser], beta, clip) / sums.steps
        losses.add_(of_pairs.detach())
        return factor * of_pairs.sum()

    step_gradient(runs.under(policy), runs.trajectory, loss)
    both = {"log_ratio": sums.log_ratio, "kl": sums.kl, "clamped": sums.clamped}
    sides = {f"{name}_{side}": v[rows] for name, v in both.items() for side, rows in (("w", winner), ("l", loser))}
    return {"loss": losses, **sides, "drift": torch.maximum(sums.drift[winner], sums.drift[loser])}


def build(o: TrainD3po, setup: OnlineSetup) -> OnlineMethod[Runs]:
    """With reference "round", the policy that drew a round is its reference."""
    rollouts = setup.rollouts(renewed=o.reference == "round")
    return d3po_method(rollouts, beta=o.beta, clip=o.clip, per_dim=setup.per_dim)


def evaluations(o: TrainD3po, tables: RunTables) -> dict[str, float]:
    found = evaluations_of_runs(o, tables)
    return found | ({"reference": 0} if o.reference == "round" else {})


METHOD = Entry(
    verb="train d3po",
    data="prompts",
    shown=("reward_mean", "implicit_accuracy"),
    length=partial(online_length, evaluations=evaluations),
    constants=describe_clamp,
    start=partial(start_with, build),
    chunks=(Runs,),
)
