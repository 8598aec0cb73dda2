"""The online methods, each as what `rounds.run_rounds` asks of one: collect, count, learn, summarise, check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from diffusion_align.objectives import implicit_accuracy
from diffusion_align.samplers import StepTable
from diffusion_align.train.branch_loss import learn_spo, pick_pairs
from diffusion_align.train.branches import Comparisons
from diffusion_align.train.method import Columns, Method
from diffusion_align.train.path_losses import learn_prdp
from diffusion_align.train.record import quantiles
from diffusion_align.train.rounding import Allowed
from diffusion_align.train.runs import Bind, Runs, asked_again, decided
from diffusion_align.train.step_losses import learn_d3po, learn_policy_gradient, pairs_of
from diffusion_align.train.steps import Sample

ALL_TIED = (
    "all pictures of every prompt had one reward, or it failed; draw more a prompt (--group_size), look at the reward"
)
Draw = Callable[[list[Sample], int], Runs]


@dataclass(frozen=True)
class Later:
    """Runs that are drawn first and scored then; `ahead`: while the next are drawn (see `Method`)."""

    score: Callable[[Runs], Runs] | None
    ahead: bool = False


NOW = Later(None)  # drawing scores


def d3po_method(
    draw: Draw,
    policy: Bind,
    reference: Bind | None,
    dims: int,
    *,
    beta: float,
    clip: float | None,
    per_dim: bool,
    allowed: Allowed,
    later: Later = NOW,
) -> Method[Runs]:
    """D3PO (Yang et al. 2023, arXiv 2311.13231) on all pairs of a prompt's runs. Constants as in `objectives.d3po`."""
    learn = partial(learn_d3po, policy=policy, beta=beta, clip=clip, per_dim=per_dim)
    return Method(
        collect=draw,
        score=later.score,
        ahead=later.ahead,
        items=lambda runs: len(pairs_of(runs)[0]),
        learn=lambda runs, factor: learn(runs, factor=factor),
        facts=facts_of,
        summarise=partial(summarise, dims=dims),
        check_start=partial(require_start, dims=dims, allowed=allowed),
        nothing=ALL_TIED,
        again=partial(asked_again, policy=policy, reference=reference),
    )


def policy_gradient_method(
    draw: Draw,
    policy: Bind,
    reference: Bind | None,
    dims: int,
    *,
    clip: float,
    std: str,
    kl_weight: float,
    per_dim: bool,
    allowed: Allowed,
    later: Later = NOW,
) -> Method[Runs]:
    """DDPO, GRPO and DPOK: the clipped surrogate with advantages in the group, and a KL to the reference."""
    learn = partial(learn_policy_gradient, policy=policy, clip=clip, std=std, kl_weight=kl_weight, per_dim=per_dim)
    return Method(
        collect=draw,
        score=later.score,
        ahead=later.ahead,
        items=lambda runs: int(decided(runs).sum()) * runs.reward.shape[1],
        learn=lambda runs, factor: learn(runs, factor=factor),
        facts=facts_of,
        summarise=partial(summarise, dims=dims),
        check_start=partial(require_start, dims=dims, allowed=allowed),
        nothing=ALL_TIED,
        again=partial(asked_again, policy=policy, reference=reference),
    )


def prdp_method(
    draw: Draw,
    policy: Bind,
    reference: Bind | None,
    dims: int,
    *,
    beta: float,
    clip: float | None,
    mean: bool,
    fresh: bool,
    allowed: Allowed,
    later: Later = NOW,
) -> Method[Runs]:
    """PRDP (Deng et al. 2024, arXiv 2402.08714). `fresh`: each round's data are used for one step only, so the runs'
    own predictions are those of the policy and spare a pass."""
    bound = allowed.prediction
    learn = partial(learn_prdp, policy=policy, beta=beta, clip=clip, mean=mean, fresh=fresh, tolerance=bound)
    return Method(
        collect=draw,
        score=later.score,
        ahead=later.ahead,
        items=lambda runs: int(decided(runs).sum()),
        learn=lambda runs, factor: learn(runs, factor=factor),
        facts=facts_of,
        summarise=partial(summarise, dims=dims),
        check_start=partial(require_start, dims=dims, allowed=allowed),
        nothing=ALL_TIED,
        again=partial(asked_again, policy=policy, reference=reference),
    )


def spo_method(
    branch: Callable[[list[Sample], int], Comparisons],
    policy: Bind,
    reference: Bind,
    table: StepTable,
    dims: int,
    *,
    beta: float,
    clip: float | None,
    per_dim: bool,
    at_once: int,
    allowed: Allowed,
) -> Method[Comparisons]:
    """SPO (Liang et al. 2024, arXiv 2406.04314)."""
    learn = partial(learn_spo, policy=policy, reference=reference, table=table, beta=beta, clip=clip, per_dim=per_dim)
    return Method(
        collect=branch,
        items=len,
        learn=lambda pairs, factor: learn(pairs, factor=factor, at_once=at_once),
        pick=partial(pick_pairs, at_once=at_once),
        facts=lambda pairs: {"score": pairs.score, "kept": pairs.kept.float()},
        summarise=partial(summarise, dims=dims),
        # Its log-ratios are of single steps.
        check_start=partial(require_start, dims=dims, allowed=replace(allowed, run=allowed.step)),
        nothing="no two children of a state were far enough apart; lower --threshold, or look at the reward",
    )


def facts_of(runs: Runs) -> Columns:
    """What a round's pictures are like, whether learnt from or not.

    reward, one a picture (nan where it failed); spread, the rewards' standard deviation in each group; diversity, the
    root mean square distance between two final latents of a group, over dims.
    """
    ends = runs.trajectory.states[-1].flatten(1).unflatten(0, runs.reward.shape)  # [G,K,D]
    size = runs.reward.shape[1]
    apart = 2 * ends.var(1, correction=0).mean(1) * size / (size - 1)
    return {"reward": runs.reward, "spread": runs.reward.std(1, correction=0), "diversity": apart.sqrt()}


def summarise(columns: Columns, facts: Columns, *, dims: int) -> dict[str, float]:
    """Metrics of a step. All log-ratios are in nats, summed over dims and, for runs, over steps."""
    metrics: dict[str, float] = {"dims": float(dims)}
    if "reward" in facts:
        known = facts["reward"][~facts["reward"].isnan()]
        metrics |= {
            "reward_mean": float(known.mean()),
            "reward_spread": float(facts["spread"].nanmean()),
            "reward_failed": float(len(facts["reward"]) - len(known)),
            "diversity": float(facts["diversity"].mean()),
        }
    if "score" in facts:
        metrics |= {"score_mean": float(facts["score"].nanmean()), "kept": float(facts["kept"].mean())}
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


def require_start(columns: Columns, *, dims: int, allowed: Allowed) -> None:
    """Stop a fresh run whose policy is not what drew the runs, or not its reference, before the first update.

    Both ratios are those of a function to itself: 1 up to the rounding that is `allowed` where kernels differ with
    gradients on. Raises RuntimeError, which says how much that is.
    """

    def largest(values: torch.Tensor) -> float:
        # A number that is not finite is the business of the step, which is then skipped.
        return float(torch.where(values.isfinite(), values, 0).abs().max())

    drift = largest(columns.get("drift", torch.zeros(1)))
    if drift > allowed.step:
        raise RuntimeError(
            "before the first update the importance ratio is not 1: a step's log-ratio to the policy that drew it is "
            f"{drift:.3g} nats over {dims} dims, and rounding in {allowed.name} explains {allowed.step:.3g}. Usual "
            "causes: dropout or something else random in the model; weights that changed after drawing"
        )
    apart = max(largest(v) for name, v in columns.items() if name.startswith("log_ratio"))
    if apart > allowed.run:
        raise RuntimeError(
            f"before the first update the policy already differs from its reference: |log-ratio| is {apart:.3g} nats "
            f"over {dims} dims, not 0, and rounding in {allowed.name} explains {allowed.run:.3g}. Usual causes: "
            "dropout is active; they run in different precision; the policy was loaded with weights that the reference "
            "lacks"
        )
