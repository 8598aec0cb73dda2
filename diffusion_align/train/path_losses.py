"""PRDP, whose loss couples all steps of all runs of a group: the exact gradient, one network graph in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_align.gaussian import Gaussian
from diffusion_align.objectives import prdp, prdp_clip_fraction
from diffusion_align.samplers import path_gradient
from diffusion_align.tensors import widen
from diffusion_align.train.method import Columns
from diffusion_align.train.runs import Bind, Runs, decided


def learn_prdp(
    runs: Runs, policy: Bind, factor: float, *,
    beta: float, clip: float | None, mean: bool = False, fresh: bool = False, tolerance: float = 1e-4,
) -> Columns:  # fmt: skip
    """Add the gradient of factor x the sum over decided groups of PRDP's loss; columns of those groups.

    With `mean` beta and clip are those of the paper's printed code, for log-ratios averaged over dims and steps; else
    they are in nats summed over both, where beta is the weight of the KL. `fresh`: no update since the runs were drawn,
    so their own predictions serve as the first pass. `tolerance`: see `path_gradient`.

    Columns: loss; log_ratio and kl, means over the group's runs of sums over the run, nats; clamped, the share of steps
    beyond the clip; drift, as in `learn_d3po`.
    """
    groups, size = runs.reward.shape
    table, states, clean = runs.trajectory.table, runs.trajectory.states, runs.trajectory.clean
    assert clean is not None  # rollouts keep them
    scored = [k for k in range(len(table)) if table.stochastic[k]]
    keep = decided(runs)
    reward = runs.reward.nan_to_num()
    unit = runs.dims if mean else 1
    over = unit * (len(scored) if mean else 1)
    kl = torch.zeros(groups * size, device=states.device)
    old = torch.stack(
        [runs.gaussian(k, clean).log_ratio(runs.gaussian(k, runs.reference), _after(runs, k)) for k in scored]
    )
    seen: dict[str, Tensor] = {}

    def measure(k: int, step: Gaussian, x: Tensor) -> Tensor:
        reference = runs.gaussian(k, runs.reference)
        kl.add_(step.kl(reference).detach())
        return step.log_ratio(reference, x)

    def loss(log_ratio: Tensor) -> Tensor:
        now, before = _grouped(log_ratio, groups)[:, :, scored], _grouped(old, groups)
        bound = None if clip is None else clip * unit
        # (mean over T and D)^2 at beta is (1 / (T D))^2 times the sum's at beta / (T D): see objectives.regression.
        of_groups = prdp(now, before, reward, beta / over, bound) / over**2
        seen["loss"] = of_groups.detach()
        seen["log_ratio"] = now.detach().sum(2).mean(1)
        seen["drift"] = (now.detach() - before).abs().amax((1, 2))
        seen["clamped"] = prdp_clip_fraction(now, before, bound) if bound else torch.zeros_like(seen["loss"])
        return factor * of_groups[keep].sum()

    known = clean if fresh else None
    path_gradient(runs.under(policy), runs.trajectory, loss, measure=measure, known=known, tolerance=tolerance)
    seen["kl"] = kl.cpu().view(groups, size).mean(1)
    return {name: values[keep] for name, values in seen.items()}


def _after(runs: Runs, k: int) -> Tensor:
    return widen(runs.trajectory.states[k + 1])


def _grouped(log_ratio: Tensor, groups: int) -> Tensor:
    """[T,B] -> [G,K,T] float64 on the CPU: next to targets of 1e9 nats, sums over steps need it."""
    return log_ratio.cpu().to(torch.float64).T.reshape(groups, -1, len(log_ratio))
