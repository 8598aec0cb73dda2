"""`train prdp`: PRDP (Deng et al. 2024, arXiv 2402.08714), regression of log-ratio differences on reward differences.

The loss couples all steps of all trajectories of a group. Its gradient is exact, and only one network graph is in
memory.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from diffusion_align.gaussian import Gaussian
from diffusion_align.methods.entry import About, Entry
from diffusion_align.methods.shared.online_setup import OnlineSetup, online_length, start_with
from diffusion_align.methods.shared.rollout_plan import RunTables, evaluations_of_runs, run_tables
from diffusion_align.methods.shared.rollouts import Rollouts, method_on_runs
from diffusion_align.methods.shared.runs import Bind, Runs, decided
from diffusion_align.objectives import prdp, prdp_clip_fraction
from diffusion_align.options import TrainPrdp
from diffusion_align.samplers import path_gradient
from diffusion_align.tensors import widen
from diffusion_align.train.method import Columns, OnlineMethod


def prdp_method(
    rollouts: Rollouts[Runs], *, beta: float, clip: float | None, mean: bool, fresh: bool
) -> OnlineMethod[Runs]:
    """PRDP on groups of runs. Constants as in `learn_prdp`. `fresh`: each round is used for one step only, so the
    predictions stored with its trajectories are those of the policy and save a pass."""

    def learn(runs: Runs, factor: float) -> Columns:
        constants = {"beta": beta, "clip": clip, "mean": mean, "fresh": fresh}
        return learn_prdp(runs, rollouts.policy, factor, tolerance=rollouts.allowed.prediction, **constants)

    return method_on_runs(rollouts, learn, items=lambda runs: int(decided(runs).sum()))


def learn_prdp(
    runs: Runs, policy: Bind, factor: float, *,
    beta: float, clip: float | None, mean: bool = False, fresh: bool = False, tolerance: float = 1e-4,
) -> Columns:  # fmt: skip
    """Add the gradient of factor x the sum over decided groups of PRDP's loss; columns of those groups.

    With `mean`, beta and clip are those of the paper's printed code, for log-ratios averaged over dims and steps;
    otherwise for nats summed over both, where beta is the weight of the KL. `fresh`: no update since the trajectories
    were drawn, so their stored predictions replace the first pass. `tolerance`: see `path_gradient`.

    Columns: loss; log_ratio and kl, in nats, summed over each trajectory and averaged over the trajectories of the
    group; clamped, the fraction of steps beyond the clip; drift, as in `learn_d3po`.
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
    """[T,B] -> [G,K,T] float64 on the CPU, which sums over steps need beside targets of 1e9 nats."""
    return log_ratio.cpu().to(torch.float64).T.reshape(groups, -1, len(log_ratio))


def used_once(o: TrainPrdp) -> bool:
    """Whether each round is used for one step only."""
    return o.passes == 1 and (o.prompts_per_step or o.prompts_per_round) == o.prompts_per_round


def build(o: TrainPrdp, setup: OnlineSetup) -> OnlineMethod[Runs]:
    return prdp_method(setup.rollouts(), beta=o.beta, clip=o.clip, mean=setup.per_dim, fresh=used_once(o))


def evaluations(o: TrainPrdp, tables: RunTables) -> dict[str, float]:
    """A pass needs one more policy evaluation without gradients, unless the stored predictions replace it."""
    found = evaluations_of_runs(o, tables)
    first = found["policy with gradient"] / o.passes * (o.passes - 1 if used_once(o) else o.passes)
    reference = found.pop("reference")
    return found | ({"without": first} if first else {}) | {"reference": reference}


def constants(o: TrainPrdp, about: About) -> list[str]:
    """beta and clip in nats."""
    unit = about.dims if o.log_ratio_unit == "mean" else 1
    noisy = o.noise_window or o.learn_steps or run_tables(o, about.schedule).noisy
    over = unit * (noisy if o.log_ratio_unit == "mean" else 1)
    clip = "none" if o.clip is None else f"{o.clip * unit:.4g} nats a step"
    return [f"beta             {o.beta / over:.4g} per nat of a trajectory", f"clip             {clip}"]


METHOD = Entry(
    verb="train prdp",
    data="prompts",
    shown=("reward_mean", "kl"),
    length=partial(online_length, evaluations=evaluations),
    constants=constants,
    start=partial(start_with, build),
    chunks=(Runs,),
)
