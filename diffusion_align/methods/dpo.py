"""`train dpo`: Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908) and other losses on pairs of pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from diffusion_align.data.cache import PairCache
from diffusion_align.methods import kto
from diffusion_align.methods.entry import About, Entry, Length, Opened, Started
from diffusion_align.methods.shared.metrics import mean_over_dims, quantiles
from diffusion_align.methods.shared.noising import Networks, drop_captions, noised_lists, pick
from diffusion_align.methods.shared.pair_losses import (
    PairLoss,
    PairOutputs,
    dspo_of_pairs,
    kto_of_pairs,
    mapo_of_pairs,
    margin_of,
    on_margin,
)
from diffusion_align.methods.shared.plan import describe_beta, latent_beta, length_of, require_accumulation
from diffusion_align.methods.shared.start_checks import apart, between_outputs, require_equal_outputs
from diffusion_align.objectives import hinge, implicit_accuracy, ipo, logistic, robust
from diffusion_align.options import TrainDpo
from diffusion_align.train.method import Columns, OfflineMethod, Sample
from diffusion_align.train.run import Run
from diffusion_align.train.steps import run_steps


def pairs_method(
    cache: PairCache,
    networks: Networks,
    run: Run,
    *,
    loss: PairLoss | Callable[[PairOutputs], Tensor],
    beta: float,
    caption_dropout: float = 0.0,
    weights: Sequence[float] | None = None,
    check_start: bool = True,
) -> OfflineMethod:
    """Training on pairs with any loss of `shared.pair_losses`.

    A micro-batch of b pairs costs one policy call on 2b rows, winners first, and one reference call where the loss
    needs a reference. The margin (eq. 14 without beta T omega) is in units of squared error summed over dims;
    `objectives.beta_per_squared_error` converts a published beta to it.

    Args:
        networks: the reference may be None for a `PairLoss` whose `needs_reference` is False.
        loss: pairs -> loss [b], with beta already bound: `on_margin(partial(logistic, beta=beta))`.
        beta: the same beta, here only to report margins as logits.
        caption_dropout: probability of training a pair under the empty prompt (0.2 in the authors' code).
        weights: [len(cache)] factors of the pairs' losses, such as the strength of a preference. The sum is still
            divided by the number of pairs, so `loss` starts at log 2 times the mean weight. None: 1 each.
        check_start: in a fresh run, raise if policy and reference differ before the first update by more than
            rounding explains (in float32 on a CPU: if they differ at all).

    Metrics: implicit_accuracy; winner_error_gap and loser_error_gap (policy minus reference, mean over dims);
    margin_p05, margin_p50, margin_p95 (beta times margin). Without a reference: only winner_error and loser_error (of
    the policy, mean over dims).

    Raises:
        ValueError: no reference for a loss that needs one, or weights that are not one finite number >= 0 per pair.
    """
    dims: list[int] = []
    compares = getattr(loss, "needs_reference", True)  # a plain function needs one
    frozen = networks.reference if compares else None
    if compares and frozen is None:
        raise ValueError("this loss compares with the frozen reference: give networks that have one")
    of_pair = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    if of_pair is not None and (
        of_pair.shape != (len(cache),) or not bool((of_pair >= 0).all() & of_pair.isfinite().all())
    ):
        raise ValueError(f"expected {len(cache)} weights, finite and not below 0, one per pair")

    def micro_batch(samples: list[Sample], _: list[Sample]) -> Columns:
        latents, text, told = pick(cache, samples, networks, run.seed)
        latents, text = latents.to(run.accelerator.device), text.to(run.accelerator.device)
        text = drop_captions(text, cache.empty_text, samples, caption_dropout, run.seed)
        noised = noised_lists(latents, text, samples, networks, run.seed, told=told)
        dims[:] = [latents[0, 0].numel()]
        with run.accelerator.autocast():
            with torch.no_grad():
                reference = None if frozen is None else frozen(noised.x, noised.t, noised.text)
            pairs = PairOutputs(networks.policy(noised.x, noised.t, noised.text), reference, noised.target)
        losses = loss(pairs)
        if of_pair is not None:
            losses = losses * of_pair[[index for _, index in samples]].to(losses)
        errors = pairs.errors.detach()
        own = {} if cache.groups is None else {"dims": torch.full_like(errors[0], dims[0])}
        if reference is None:
            return {"loss": losses, "winner_error": errors[0], "loser_error": errors[1]} | own
        gap = errors - pairs.reference_errors
        columns = {"loss": losses, "margin": margin_of(pairs), "winner_gap": gap[0], "loser_gap": gap[1]}
        return columns | own | ({"apart": apart(pairs.policy, reference, 2)} if check_start else {})

    def summarise(columns: Columns) -> dict[str, float]:
        per_dim = partial(mean_over_dims, dims=columns.get("dims", dims[0]))
        if frozen is None:
            return {name: per_dim(columns[name]) for name in ("winner_error", "loser_error")}
        return {
            "implicit_accuracy": float(implicit_accuracy(columns["margin"]).mean()),
            "winner_error_gap": per_dim(columns["winner_gap"]),
            "loser_error_gap": per_dim(columns["loser_gap"]),
            **quantiles("margin", beta * columns["margin"]),
        }

    check = partial(require_equal_outputs, allowed=between_outputs(run.accelerator)) if check_start and frozen else None
    return OfflineMethod(len(cache), micro_batch, summarise, check, groups=cache.groups)


def make_loss(o: TrainDpo, beta: float, timesteps: int) -> PairLoss:
    """The loss of pairs that the options name; beta is per squared error summed over dims (MaPO has its own).

    Loss type `kto` is not made here: it learns from single pictures (`methods.kto`).
    """
    of_margin = {
        "sigmoid": partial(logistic, beta=beta, label_smoothing=o.label_smoothing),
        "robust": partial(robust, beta=beta, flip=o.label_smoothing),
        "hinge": partial(hinge, beta=beta),
        # (beta margin - 1/2)^2 has the minimum of IPO's loss but no unit, so the same learning rates and gradient clips
        # fit all losses. IPO's own scale, for errors summed over dims, is D^2.
        "ipo": lambda margin: beta**2 * ipo(margin, beta),
    }
    if o.loss_type in of_margin:
        return on_margin(of_margin[o.loss_type], keep=o.winner_share)
    return {
        "kto_pairs": lambda: kto_of_pairs(beta),
        "mapo": lambda: mapo_of_pairs(o.mapo_beta, timesteps),
        "dspo": lambda: dspo_of_pairs(beta, o.dspo_strength),
    }[o.loss_type]()


def needs_reference(o: TrainDpo) -> bool:
    """Whether the loss compares with the frozen model, which does not depend on its constants."""
    return o.loss_type == "kto" or make_loss(o, beta=1.0, timesteps=1).needs_reference


def start(o: TrainDpo, opened: Opened) -> Started:
    """Encode the pairs; the loop is that of pairs, or of single pictures for KTO."""
    cache = opened.encode(opened.items, opened.bad_rows)
    beta = latent_beta(o, opened.shape)
    weights = [opened.items[place].weight for place in cache.kept]

    def method(run: Run) -> OfflineMethod:
        common = {"beta": beta, "caption_dropout": o.proportion_empty_prompts, "weights": weights}
        if o.loss_type == "kto":
            return kto.pictures_method(cache, opened.networks, run, liked_share=o.liked_share, **common)
        loss = make_loss(o, beta, opened.networks.schedule.num_timesteps)
        return pairs_method(cache, opened.networks, run, loss=loss, **common)

    return Started(
        count=len(cache),
        identity=cache.identity | {"beta": beta},
        loop=lambda run, length: run_steps(method(run), run, batch_size=length.batch, accumulation=length.accumulation),
    )


def length(o: TrainDpo, about: About) -> Length:
    """Batch and steps. KTO counts visits to pairs: each visit shows one picture of the pair."""
    found = length_of(o, about, "pairs")
    first, *others = found.lines
    return found.with_lines([first + (", one picture of each" if o.loss_type == "kto" else ""), *others])


def constants(o: TrainDpo, about: About) -> list[str]:
    """beta in every unit, the values that the loss can reach, its other constants, and the reference if it has one."""
    own = {
        "kto": f"liked_share      {o.liked_share:g} of the visits show the winner, the others the loser",
        "mapo": f"mapo_beta        {o.mapo_beta:g}, weight of the preference beside the winner's error",
        "dspo": f"dspo_strength    {o.dspo_strength:g}, how far the winner's target is pushed from the reference",
    }
    compares, keep = needs_reference(o), o.winner_share
    frozen = "the model without its LoRA" if o.mode == "lora" else "a frozen copy of the UNet"
    none = "none: no frozen copy is kept, and metrics that compare with it are not logged"
    return [
        *(describe_beta(o, about) if compares else []),
        f"loss             {o.loss_type}, {_reach(o)}",
        *([own[o.loss_type]] if o.loss_type in own else []),
        *([] if keep is None else [f"winner_share     {keep:g} of the winner's fall is kept (Diffusion-SDPO)"]),
        f"reference        {frozen if compares else none}",
    ]


def _reach(o: TrainDpo) -> str:
    """Where the loss starts (margin 0) and which values it can reach."""
    q = o.label_smoothing
    if o.loss_type == "sigmoid" and q:
        lowest = -q * math.log(q) - (1 - q) * math.log1p(-q)
        return f"starts at log 2 = 0.6931, reaches [{lowest:.4f}, inf); the minimum is the entropy of the smoothing"
    return {
        "sigmoid": "starts at log 2 = 0.6931, reaches (0, inf)",
        "hinge": "starts at 1, reaches [0, inf)",
        "ipo": "(beta margin - 1/2)^2, starts at 1/4, reaches [0, inf)",
        "robust": "starts at log 2 = 0.6931, "
        + ("has no minimum: watch the margins, not the loss" if q else "reaches (0, inf)"),
        "kto": "of single pictures, starts at 1/2, reaches (0, 1)",
        "kto_pairs": "mean over winner and loser, starts at 1/2, reaches (0, 1)",
        "mapo": "the winner's error, mean over dims, and mapo_beta times a log sigmoid; no reference",
        "dspo": "the winner's error, mean over dims, against a target pushed away from the reference",
    }[o.loss_type]


METHOD = Entry(
    verb="train dpo",
    data="pairs",
    shown=("implicit_accuracy",),
    require=require_accumulation,
    needs_reference=needs_reference,
    length=length,
    constants=constants,
    start=start,
)
