"""The metrics of a step, under the names that all methods use."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_align.gaussian import Gaussian
from diffusion_align.methods.shared.runs import Runs
from diffusion_align.objectives import implicit_accuracy
from diffusion_align.tensors import widen
from diffusion_align.train.method import Columns


def quantiles(name: str, values: Tensor) -> dict[str, float]:
    """The 5th, 50th and 95th percentile of values [M], under the names that all methods use."""
    low, middle, high = values.quantile(values.new_tensor([0.05, 0.5, 0.95])).tolist()
    return {f"{name}_p05": low, f"{name}_p50": middle, f"{name}_p95": high}


def mean_over_dims(values: Tensor, dims: Tensor | int) -> float:
    """The mean of values [M] that are sums over dims; `dims` is [M] if their numbers of dims differ."""
    return float((values / dims).mean() if isinstance(dims, Tensor) else values.mean() / dims)


class RunSums:
    """Sums over the steps of each trajectory, [B] each: log_ratio, kl, clamped; and the maximum, drift."""

    def __init__(self, runs: Runs):
        self.runs = runs
        zeros = torch.zeros(runs.reward.numel(), device=runs.text.device)
        self.log_ratio, self.kl, self.drift, self.clamped = (zeros.clone() for _ in range(4))
        self.steps = int(runs.trajectory.table.stochastic.sum())

    def add(self, k: int, step: Gaussian) -> tuple[Tensor, Tensor, Gaussian]:
        """Add a step; its log-ratios [B] to the reference and to the policy that drew it, and the reference's step."""
        runs, after = self.runs, widen(self.runs.trajectory.states[k + 1])
        reference = runs.gaussian(k, runs.reference)
        assert runs.trajectory.clean is not None  # rollouts keep them
        behaviour = runs.gaussian(k, runs.trajectory.clean)
        ratio, drift = step.log_ratio(reference, after), step.log_ratio(behaviour, after)
        self.log_ratio += ratio.detach()
        self.kl += step.kl(reference).detach()
        self.drift = torch.maximum(self.drift, drift.detach().abs())
        return ratio, drift, reference


def round_columns(runs: Runs) -> Columns:
    """Columns of all pictures of a round, also of those that no step learns from.

    reward, one per picture (nan if it failed); spread, the standard deviation of the rewards of each group; diversity,
    the root mean square distance between two final latents of a group, over dims.
    """
    ends = runs.trajectory.states[-1].flatten(1).unflatten(0, runs.reward.shape)  # [G,K,D]
    size = runs.reward.shape[1]
    apart = 2 * ends.var(1, correction=0).mean(1) * size / (size - 1)
    return {"reward": runs.reward, "spread": runs.reward.std(1, correction=0), "diversity": apart.sqrt()}


def summarise_runs(columns: Columns, drawn: Columns, *, dims: int) -> dict[str, float]:
    """Metrics of a step, from the columns of its items and of the `drawn` round. Log-ratios are in nats, summed over
    dims and, for trajectories, over steps."""
    metrics: dict[str, float] = {"dims": float(dims)}
    if "reward" in drawn:
        known = drawn["reward"][~drawn["reward"].isnan()]
        metrics |= {
            "reward_mean": float(known.mean()),
            "reward_spread": float(drawn["spread"].nanmean()),
            "reward_failed": float(len(drawn["reward"]) - len(known)),
            "diversity": float(drawn["diversity"].mean()),
        }
    if "score" in drawn:
        metrics |= {"score_mean": float(drawn["score"].nanmean()), "kept": float(drawn["kept"].mean())}
    if not columns:
        return metrics
    for name, values in columns.items():
        if name.startswith("log_ratio"):
            metrics |= quantiles(name, values)
    if "log_ratio_w" in columns:
        metrics["implicit_accuracy"] = float(implicit_accuracy(columns["log_ratio_w"] - columns["log_ratio_l"]).mean())
    for name, values in columns.items():
        if name.startswith(("kl", "clamped", "drift", "gap")):
            metrics[name] = float(values.mean())
    return metrics
