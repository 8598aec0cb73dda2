"""`train spo`: SPO (Liang et al. 2024, arXiv 2406.04314, eq. 5) on pairs of transitions from one state."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from diffusion_align.gaussian import Gaussian
from diffusion_align.methods.entry import About, Entry, Length, Opened, Started
from diffusion_align.methods.shared.branch_plan import evaluations, plan_rounds
from diffusion_align.methods.shared.branches import Branching, Comparisons, StepScore, resample
from diffusion_align.methods.shared.metrics import summarise_runs
from diffusion_align.methods.shared.online_setup import (
    OnlineSetup,
    describe_clamp,
    online_length,
    start_with,
)
from diffusion_align.methods.shared.rollout_plan import run_tables
from diffusion_align.methods.shared.rollouts import Rollouts
from diffusion_align.methods.shared.runs import Bind
from diffusion_align.methods.shared.start_checks import require_equal_ratios
from diffusion_align.objectives import clamped, spo
from diffusion_align.options import TrainSpo
from diffusion_align.options.train.spo import compared_from
from diffusion_align.origins import STEP_AWARE
from diffusion_align.rewards.step_aware_load import latent_scorer, step_aware_weights
from diffusion_align.samplers import StepTable, step_gaussian
from diffusion_align.tensors import widen
from diffusion_align.train.method import Columns, OnlineMethod, Sample


def spo_method(
    comparisons: Rollouts[Comparisons],
    table: StepTable,
    *,
    beta: float,
    clip: float | None,
    per_dim: bool,
    at_once: int,
) -> OnlineMethod[Comparisons]:
    """SPO on comparisons. Constants as in `learn_spo`; `at_once`: families in the network at a time."""
    policy, reference = comparisons.policy, comparisons.reference
    assert reference is not None  # a frozen one
    constants = {"beta": beta, "clip": clip, "per_dim": per_dim, "at_once": at_once}
    # Log-ratios here belong to single steps.
    allowed = replace(comparisons.allowed, run=comparisons.allowed.step)
    return OnlineMethod(
        collect=comparisons.draw,
        items=len,
        learn=lambda pairs, factor: learn_spo(pairs, policy, reference, table, factor, **constants),
        pick=partial(pick_pairs, at_once=at_once),
        round_columns=lambda pairs: {"score": pairs.score, "kept": pairs.kept.float()},
        summarise=partial(summarise_runs, dims=comparisons.dims),
        check_start=partial(require_equal_ratios, dims=comparisons.dims, allowed=allowed),
        empty_step_advice="no two children of a state differed enough; lower threshold, or check the reward",
    )


def learn_spo(
    pairs: Comparisons,
    policy: Bind,
    reference: Bind,
    table: StepTable,
    factor: float,
    *,
    beta: float,
    clip: float | None,
    per_dim: bool = True,
    at_once: int = 64,
) -> Columns:
    """Add the gradient of factor x the sum over pairs of SPO's loss; columns of the M pairs.

    The network processes `at_once` families at a time. Each costs one policy and one reference evaluation, because its
    pairs share their parent; in segments of more than one step they do not, and each pair costs two of each. Steps of
    second order double that, for the states before.
    Columns: loss; log_ratio_w, log_ratio_l of the step in nats; kl, mean of both sides; clamped_w, clamped_l; gap.
    """
    order = int(table.order[pairs.k.cpu()].max())
    unit = pairs.dims if per_dim else 1
    found = []
    for rows in _rows_by_family(pairs, at_once):
        with torch.no_grad():
            frozen = _steps(reference, table, pairs, rows, order)
        live = _steps(policy, table, pairs, rows, order)
        after = widen(pairs.child[:, rows])
        win, lose = (now.log_ratio(then, x) / unit for now, then, x in zip(live, frozen, after, strict=True))
        losses = spo(win, lose, beta, clip)
        (factor * losses.sum()).backward()
        columns = {
            "loss": losses,
            "log_ratio_w": win * unit,
            "log_ratio_l": lose * unit,
            "kl": sum(now.kl(then) for now, then in zip(live, frozen, strict=True)) / 2,
            "clamped_w": clamped(win, clip).float(),
            "clamped_l": clamped(lose, clip).float(),
            "gap": pairs.gap[rows],
        }
        found.append({name: values.detach() for name, values in columns.items()})
    return {name: torch.cat([columns[name] for columns in found]) for name in found[0]}


def pick_pairs(chunks: list[Comparisons], numbers: Tensor, at_once: int) -> list[Comparisons]:
    """The pairs with these increasing numbers [m], counted by prompt and step over all chunks (`by_prompt`).

    They are joined and then split into chunks of `at_once` families, because a step may take few pairs of each chunk.
    """
    picked, first, families = [], 0, 0
    for chunk in chunks:
        here = numbers[(numbers >= first) & (numbers < first + len(chunk))] - first
        if len(here):
            pairs = chunk.of(chunk.by_prompt()[here])
            _, family = pairs.family.unique_consecutive(return_inverse=True)
            picked.append(replace(pairs, family=family + families))
            families += int(family[-1]) + 1
        first += len(chunk)
    joined = {name: torch.cat([getattr(p, name) for p in picked], 1) for name in ("before", "parent", "child")}
    joined |= {name: torch.cat([getattr(p, name) for p in picked]) for name in ("k", "text", "gap", "family")}
    return replace(picked[0], **joined).split(-(-families // at_once))


def _rows_by_family(pairs: Comparisons, at_once: int) -> list[Tensor]:
    """Row numbers of `at_once` families at a time; of `at_once` pairs, if the pairs of a family share no parent."""
    if not pairs.shared:
        return list(torch.arange(len(pairs)).split(at_once))
    _, sizes = pairs.family.cpu().unique_consecutive(return_counts=True)
    return list(torch.arange(len(pairs)).split([int(some.sum()) for some in sizes.split(at_once)]))


def _steps(bind: Bind, table: StepTable, pairs: Comparisons, rows: Tensor, order: int) -> tuple[Gaussian, Gaussian]:
    """The Gaussians of the winners' and of the losers' steps. If the pairs of a family share their parent, both are the
    same, and the network is evaluated once per family."""
    sides = 1 if pairs.shared else 2
    place, evaluated = torch.arange(len(rows)), rows
    if pairs.shared:
        _, place, sizes = pairs.family[rows].cpu().unique_consecutive(return_inverse=True, return_counts=True)
        evaluated = rows[sizes.cumsum(0) - sizes]
    k = pairs.k[evaluated].repeat(sides)
    denoise = bind(pairs.text[evaluated].repeat(sides, 1, 1))

    def clean_at(states: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        x = widen(states[:sides, evaluated].flatten(0, 1))
        return x, widen(denoise(x, table.gather("timesteps", k, x)))

    x, clean = clean_at(pairs.parent, k)
    earlier = clean_at(pairs.before, (k - 1).clamp(min=0))[1] if order > 1 else None
    mean, std = step_gaussian(table, k, x, clean, earlier)
    both = [Gaussian(m[place], s[place]) for m, s in zip(mean.chunk(sides), std.chunk(sides), strict=True)]
    return both[0], both[-1]


def build(o: TrainSpo, setup: OnlineSetup) -> OnlineMethod[Comparisons]:
    score = step_score(o, setup)
    how = Branching(o.children, compared_from(o), o.threshold, o.segment, o.pairs == "all", o.lookahead)

    def draw(samples: list[Sample], round: int) -> Comparisons:
        prompted, table = setup.prompted(samples), setup.table_of(round)
        return resample(
            setup.policy, table, prompted, score, how, shape=setup.shape, seed=o.seed, quiet=setup.tables.quiet
        )  # fmt: skip

    comparisons = Rollouts(draw, setup.policy, setup.reference, setup.dims, setup.allowed)
    constants = {"beta": o.beta, "clip": o.clip, "per_dim": setup.per_dim, "at_once": o.sample_chunk}
    return spo_method(comparisons, setup.tables.whole, **constants)


def step_score(o: TrainSpo, setup: OnlineSetup) -> StepScore:
    """The step-aware preference model if one is given, else the plain reward at every step."""
    if o.preference_model is None:
        plain = setup.picture_score()
        return lambda clean, prompts, t: plain(clean, prompts)
    model = setup.opened.model
    return latent_scorer(o.preference_model, decode=model.decode, device=model.device, chunk=o.sample_chunk)


def require(o: TrainSpo) -> None:
    """Raise FileNotFoundError, before the base is loaded, if the preference model does not exist."""
    source = o.preference_model
    if source is not None and not step_aware_weights(source).is_file():
        raise FileNotFoundError(
            f"preference model {source}: {step_aware_weights(source)} does not exist; give a folder of "
            f"`reward train-spm`, a file as SPO's authors publish it, or one of {', '.join(STEP_AWARE)}"
        )


def start(o: TrainSpo, opened: Opened) -> Started:
    """The rounds. The identity of the run holds the content of the preference model's weights, not their name."""
    started, source = start_with(build, o, opened), o.preference_model
    return replace(started, identity=started.identity | {"preference_model": source and weights_digest(source)})


def weights_digest(source: str) -> str:
    """A digest of a preference model's file, read in blocks: a published one has 5 GB."""
    with step_aware_weights(source).open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def length(o: TrainSpo, about: About) -> Length:
    """Rounds whose steps take all pairs of their prompts, or `pairs_per_step` pairs of the round."""
    plan = plan_rounds(o, about.processes, run_tables(o, about.schedule))
    return online_length(o, about, plan=plan, evaluations=evaluations)


METHOD = Entry(
    verb="train spo",
    data="prompts",
    shown=("score_mean", "kept"),
    require=require,
    length=length,
    constants=describe_clamp,
    start=start,
    chunks=(Comparisons,),
)
