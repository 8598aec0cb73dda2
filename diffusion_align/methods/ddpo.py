"""`train ddpo`: policy gradients with a clipped surrogate: DDPO, GRPO and, with a KL to the reference, DPOK."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from diffusion_align.gaussian import Gaussian
from diffusion_align.methods.entry import About, Entry
from diffusion_align.methods.shared.metrics import RunSums
from diffusion_align.methods.shared.online_setup import OnlineSetup, online_length, start_with
from diffusion_align.methods.shared.rollouts import Rollouts, method_on_runs
from diffusion_align.methods.shared.runs import Bind, Runs, decided
from diffusion_align.objectives import clamped, group_advantage, ppo_clip
from diffusion_align.options import TrainDdpo
from diffusion_align.samplers import step_gradient
from diffusion_align.train.method import Columns, OnlineMethod


def policy_gradient_method(
    rollouts: Rollouts[Runs], *, clip: float, std: str, kl_weight: float, per_dim: bool
) -> OnlineMethod[Runs]:
    """DDPO, GRPO and DPOK: the clipped surrogate with advantages within the group, and a KL to the reference."""

    def learn(runs: Runs, factor: float) -> Columns:
        constants = {"clip": clip, "std": std, "kl_weight": kl_weight, "per_dim": per_dim}
        return learn_policy_gradient(runs, rollouts.policy, factor, **constants)

    return method_on_runs(rollouts, learn, items=lambda runs: int(decided(runs).sum()) * runs.reward.shape[1])


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
    """Add the gradient of factor x the sum over trajectories of PPO's clipped surrogate, averaged over steps; a column
    entry for each trajectory.

    DDPO and GRPO take advantages within the group; DPOK adds `kl_weight` times the exact KL, in nats, between the
    Gaussians of policy and reference. Only decided groups count, so the result does not depend on the chunks. Columns
    as in `learn_d3po`, one per trajectory instead of _w and _l, for the trajectories of those groups.
    """
    advantage = advantages(runs.reward, std).flatten().clamp(-max_advantage, max_advantage).to(runs.text.device)
    counts = decided(runs).repeat_interleave(runs.reward.shape[1]).to(runs.text.device)
    sums = RunSums(runs)
    unit = runs.dims if per_dim else 1
    losses = torch.zeros_like(sums.kl)

    def loss(k: int, step: Gaussian) -> Tensor:
        _, drift, reference = sums.add(k, step)
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
    """`group_advantage`, and 0 for all trajectories of a group in which a reward failed."""
    return group_advantage(torch.where(reward.isnan().any(1, keepdim=True), 0.0, reward), std)


def build(o: TrainDdpo, setup: OnlineSetup) -> OnlineMethod[Runs]:
    constants = {"std": o.advantage_std, "kl_weight": o.kl_weight, "per_dim": setup.per_dim}
    return policy_gradient_method(setup.rollouts(), clip=o.clip, **constants)


def constants(o: TrainDdpo, about: About) -> list[str]:
    unit = about.dims if o.log_ratio_unit == "mean" else 1
    return [f"clip             {o.clip * unit:.4g} nats a step", f"kl_weight        {o.kl_weight:g} per nat of a step"]


METHOD = Entry(
    verb="train ddpo",
    data="prompts",
    shown=("reward_mean", "kl"),
    length=online_length,
    constants=constants,
    start=partial(start_with, build),
    chunks=(Runs,),
)
