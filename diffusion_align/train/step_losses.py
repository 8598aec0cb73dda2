"""Methods whose loss is a sum over steps: D3PO on pairs of runs; policy gradients (DDPO, GRPO, DPOK) on single runs.

Both walk the runs once, a step's Gaussian at a time (`samplers.step_gradient`): each picture is evaluated once a step,
however many pairs it is in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_align.gaussian import Gaussian
from diffusion_align.objectives import clamped, d3po, group_advantage, ordered_pairs, ppo_clip
from diffusion_align.samplers import step_gradient
from diffusion_align.tensors import widen
from diffusion_align.train.method import Columns
from diffusion_align.train.runs import Bind, Runs, decided


def pairs_of(runs: Runs) -> tuple[Tensor, Tensor]:
    """Rows of winners and losers [M] among the runs: every pair of a group with a preference. A nan reward has none."""
    group, winner, loser = ordered_pairs(runs.reward)
    size = runs.reward.shape[1]
    return group * size + winner, group * size + loser


class _Sums:
    """Per-run sums over the steps of a walk, [B] each, and what is asked of each step on the way."""

    def __init__(self, runs: Runs):
        self.runs = runs
        zeros = torch.zeros(runs.reward.numel(), device=runs.text.device)
        self.log_ratio, self.kl, self.drift, self.clamped = (zeros.clone() for _ in range(4))
        self.steps = int(runs.trajectory.table.stochastic.sum())

    def note(self, k: int, step: Gaussian) -> tuple[Tensor, Tensor, Gaussian]:
        """Log-ratio of the stored next state [B] to the reference, to the policy that ran, and the reference's step."""
        runs, after = self.runs, widen(self.runs.trajectory.states[k + 1])
        reference = runs.gaussian(k, runs.reference)
        assert runs.trajectory.clean is not None  # rollouts keep them
        behaviour = runs.gaussian(k, runs.trajectory.clean)
        ratio, drift = step.log_ratio(reference, after), step.log_ratio(behaviour, after)
        self.log_ratio += ratio.detach()
        self.kl += step.kl(reference).detach()
        self.drift = torch.maximum(self.drift, drift.detach().abs())
        return ratio, drift, reference


def learn_d3po(
    runs: Runs, policy: Bind, factor: float, *, beta: float, clip: float | None, per_dim: bool = True
) -> Columns:
    """Add the gradient of factor x the sum over pairs of D3PO's loss, averaged over steps; columns of the M pairs.

    `per_dim`: beta and clip belong to log-ratios averaged over the dims, as published; else to nats. Columns: loss;
    log_ratio_w, log_ratio_l and kl_w, kl_l, sums over the run in nats; clamped_w, clamped_l, shares of the steps;
    drift, the largest |log-ratio| of a step in nats to the policy that ran.
    """
    winner, loser = (rows.to(runs.text.device) for rows in pairs_of(runs))
    sums = _Sums(runs)
    unit = runs.dims if per_dim else 1
    losses = torch.zeros(len(winner), device=winner.device)

    def loss(k: int, step: Gaussian) -> Tensor:
        ratio = sums.note(k, step)[0] / unit
        sums.clamped += clamped(ratio, clip) / sums.steps
        of_pairs = d3po(ratio[winner], ratio[loser], beta, clip) / sums.steps
        losses.add_(of_pairs.detach())
        return factor * of_pairs.sum()

    step_gradient(runs.under(policy), runs.trajectory, loss)
    both = {"log_ratio": sums.log_ratio, "kl": sums.kl, "clamped": sums.clamped}
    sides = {f"{name}_{side}": v[rows] for name, v in both.items() for side, rows in (("w", winner), ("l", loser))}
    return {"loss": losses, **sides, "drift": torch.maximum(sums.drift[winner], sums.drift[loser])}


def learn_policy_gradient(
    runs: Runs,
    policy: Bind,
    factor: float,
    *,
    clip: float,
    std: str = "group",
    kl_weight: float = 0.0,
    max_advantage: float = 5.0,
    per_dim: bool = True,
) -> Columns:
    """Add the gradient of factor x the sum over runs of PPO's clipped surrogate, averaged over steps; columns of runs.

    DDPO and GRPO with their advantages within the group, DPOK with a `kl_weight` on the nats to the reference, which
    is the exact divergence of the steps' Gaussians. Only decided groups count, so that it does not matter which chunk a
    group is in. Columns as `learn_d3po`, without sides, of the runs of those groups.
    """
    advantage = advantages(runs.reward, std).flatten().clamp(-max_advantage, max_advantage).to(runs.text.device)
    counts = decided(runs).repeat_interleave(runs.reward.shape[1]).to(runs.text.device)
    sums = _Sums(runs)
    unit = runs.dims if per_dim else 1
    losses = torch.zeros_like(sums.kl)

    def loss(k: int, step: Gaussian) -> Tensor:
        _, drift, reference = sums.note(k, step)
        sums.clamped += clamped(drift / unit, clip) / sums.steps
        of_runs = ppo_clip(drift / unit, advantage.to(drift), clip) + kl_weight * step.kl(reference)
        losses.add_(of_runs.detach() / sums.steps)
        return factor * of_runs[counts].sum() / sums.steps

    step_gradient(runs.under(policy), runs.trajectory, loss)
    columns = {
        "loss": losses, "log_ratio": sums.log_ratio, "kl": sums.kl, "clamped": sums.clamped, "drift": sums.drift
    }  # fmt: skip
    return {name: values[counts] for name, values in columns.items()}


def advantages(reward: Tensor, std: str) -> Tensor:
    """`group_advantage` where a reward may have failed: all of its group then count for nothing."""
    return group_advantage(torch.where(reward.isnan().any(1, keepdim=True), 0.0, reward), std)
