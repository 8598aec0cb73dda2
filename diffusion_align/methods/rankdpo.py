"""`train rankdpo`: RankDPO on rankings of pictures (Karthik et al. 2024, arXiv 2410.18013).

The score of a picture is by how much the policy's squared error is below the reference's (minus the paper's s). The
loss couples the K scores of a prompt, but its gradient is a sum over pictures of dL/dscore_i times the gradient of one
error, so K pictures need no more network memory than one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusion_align.data import Ranking
from diffusion_align.data.cache import PairCache
from diffusion_align.data.disk import digest
from diffusion_align.methods.entry import About, Entry, Length, Opened, Started
from diffusion_align.methods.shared.metrics import mean_over_dims, quantiles
from diffusion_align.methods.shared.noising import (
    Networks,
    Noised,
    Predict,
    denoising_errors,
    drop_captions,
    noised_lists,
    pick,
)
from diffusion_align.methods.shared.plan import describe_beta, latent_beta, length_of, require_accumulation
from diffusion_align.methods.shared.start_checks import apart, between_outputs, require_equal_outputs
from diffusion_align.objectives import best_and_worst, gain_weights, implicit_accuracy, rank_dpo
from diffusion_align.options import TrainRankdpo
from diffusion_align.train.method import Columns, OfflineMethod, Sample
from diffusion_align.train.run import Run, StepRecord
from diffusion_align.train.steps import run_steps


def ranking_scores(predict_policy: Predict, predict_reference: Predict, noised: Noised, *, one_graph: bool) -> Tensor:
    """Squared errors, reference minus policy, summed over dims in float32, [B,K]; gradients flow to the policy only.

    By default each network is called once on all K B rows. With `one_graph` it is called on one picture of each ranking
    at a time; the graph is discarded and recomputed in the backward pass. The gradient is the same, activations are
    those of B rows instead of K B, and the policy is evaluated twice.
    """
    if not one_graph:
        with torch.no_grad():
            reference = denoising_errors(predict_reference, noised)
        return reference - denoising_errors(predict_policy, noised)
    rows = [tensor.chunk(noised.entries) for tensor in noised[:4]]
    scores = []
    for x, t, text, wanted in zip(*rows, strict=True):
        alone = Noised(x, t, text, wanted, 1)
        with torch.no_grad():
            reference = denoising_errors(predict_reference, alone)
        # Nothing in the networks is random, so the recomputation needs no generator state.
        policy = checkpoint(denoising_errors, predict_policy, alone, use_reentrant=False, preserve_rng_state=False)
        scores.append(reference - policy)
    return torch.cat(scores, 1)


@dataclass(frozen=True)
class RankingLoss:
    """A loss of rankings with its constants.

    of_scores: (scores [b,K], relevance [b,K]) -> [b], with beta bound; `objectives.rank_dpo`.
    pair_weights: relevance [b,K] -> [b,K,K], the weight of a pair in the metrics; `objectives.gain_weights`.
    beta: of the loss, here only to report margins as logits.
    """

    of_scores: Callable[[Tensor, Tensor], Tensor]
    pair_weights: Callable[[Tensor], Tensor]
    beta: float


def rankings_method(
    cache: PairCache,
    networks: Networks,
    run: Run,
    relevance: Sequence[Sequence[float]],
    *,
    loss: RankingLoss,
    shared_noise: bool = False,
    one_graph: bool = False,
    caption_dropout: float = 0.0,
    check_start: bool = True,
) -> OfflineMethod:
    """Training on rankings with a loss of scores and relevance.

    Args:
        relevance: [len(cache)][K], higher is better, in the order of the cache.
        shared_noise: one noise for the K pictures of a prompt, as in Diffusion-DPO; the paper has K.
        one_graph: keep the network's activations for one picture of a prompt at a time.
        Others as in `dpo.pairs_method`.

    Metrics, with w and l the most and least relevant picture of a prompt: implicit_accuracy, of all pairs, weighted;
    winner_error_gap and loser_error_gap, policy minus reference on w and l, mean over dims; margin_p05, margin_p50,
    margin_p95 of beta (score_w - score_l); pair_weight, the mean over prompts of the sum of their weights.

    Raises ValueError for relevance that does not fit the cache, or networks without a reference.
    """
    if [len(values) for values in relevance] != cache.lengths:
        raise ValueError(
            f"relevance of {len(relevance)} rankings does not fit the {len(cache)} in the cache, or their K"
        )
    if networks.reference is None:
        raise ValueError("RankDPO compares with the frozen reference: give networks that have one")
    reference, dims = networks.reference, [0]

    def of_one_length(samples: list[Sample]) -> Columns:
        indices = [index for _, index in samples]
        picked = pick(cache, samples, networks, run.seed)
        latents, text = (tensor.to(run.accelerator.device) for tensor in picked[:2])
        text = drop_captions(text, cache.empty_text, samples, caption_dropout, run.seed)
        noised = noised_lists(latents, text, samples, networks, run.seed, shared_noise=shared_noise, told=picked.told)
        dims[:] = [latents[0, 0].numel()]
        mine: list[Tensor] = []
        theirs: list[Tensor] = []
        with run.accelerator.autocast():
            both = recording(networks.policy, mine), recording(reference, theirs)
            scores = ranking_scores(*both, noised, one_graph=one_graph)
        phi = torch.tensor([relevance[index] for index in indices], dtype=torch.float64).to(scores)
        columns = {"loss": loss.of_scores(scores, phi), **_columns(scores.detach(), phi, loss.pair_weights(phi))}
        if cache.groups is not None:
            columns["dims"] = torch.full_like(columns["margin"], dims[0])
        return columns | ({"apart": apart(torch.cat(mine), torch.cat(theirs), noised.entries)} if check_start else {})

    def micro_batch(samples: list[Sample], _: list[Sample]) -> Columns:
        lengths = [cache.lengths[index] for _, index in samples]
        by_length = [
            of_one_length([sample for sample, k in zip(samples, lengths, strict=True) if k == length])
            for length in sorted(set(lengths))
        ]
        # The rows are now sorted by length, which does not change their mean.
        return {name: torch.cat([columns[name] for columns in by_length]) for name in by_length[0]}

    def summarise(columns: Columns) -> dict[str, float]:
        weight = columns["weight"].sum()
        per_dim = partial(mean_over_dims, dims=columns.get("dims", dims[0]))
        return {
            "implicit_accuracy": float(columns["right"].sum() / weight),
            "winner_error_gap": per_dim(columns["winner_gap"]),
            "loser_error_gap": per_dim(columns["loser_gap"]),
            **quantiles("margin", loss.beta * columns["margin"]),
            "pair_weight": float(weight / len(columns["margin"])),
        }

    check = partial(require_equal_outputs, allowed=between_outputs(run.accelerator)) if check_start else None
    return OfflineMethod(len(cache), micro_batch, summarise, check, groups=cache.groups)


def recording(predict: Predict, outputs: list[Tensor]) -> Predict:
    """The same network, which also appends each output, without its graph, to `outputs`."""

    def predict_and_record(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        output = predict(x, t, text)
        outputs.append(output.detach())
        return output

    return predict_and_record


def _columns(scores: Tensor, relevance: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The columns [b] that metrics are computed from, given scores [b,K]."""
    weights = weights * (relevance[:, :, None] > relevance[:, None, :])  # [b,i,j]: i is preferred to j
    right = implicit_accuracy(scores[:, :, None] - scores[:, None, :])
    best, worst, _ = best_and_worst(relevance)
    winner, loser = (scores.gather(1, place[:, None])[:, 0] for place in (best, worst))
    return {
        "right": (weights * right).sum((1, 2)),
        "weight": weights.sum((1, 2)),
        "winner_gap": 0 - winner,  # not -winner, which would write -0.0 to metrics.jsonl at the start
        "loser_gap": 0 - loser,
        "margin": winner - loser,
    }


def start(o: TrainRankdpo, opened: Opened) -> Started:
    """Encode the rankings. A resumed run may split its batches differently into micro-batches and ranks."""
    cache = opened.encode(opened.items, opened.bad_rows)
    relevance = [opened.items[place].relevance for place in cache.kept]
    beta = latent_beta(o, opened.shape)
    loss = RankingLoss(
        partial(rank_dpo, beta=beta, pair_norm=o.pair_norm, discount=o.discount),
        partial(gain_weights, discount=o.discount),
        beta,
    )

    def loop(run: Run, length: Length) -> Iterator[StepRecord]:
        method = rankings_method(
            cache, opened.networks, run, relevance, loss=loss, shared_noise=o.shared_noise,
            one_graph=o.one_picture_at_a_time, caption_dropout=o.proportion_empty_prompts,
        )  # fmt: skip
        return run_steps(method, run, batch_size=length.batch, accumulation=length.accumulation)

    labels = digest(json.dumps(relevance).encode())  # they are not part of the cache
    return Started(len(cache), cache.identity | {"beta": beta, "relevance": labels}, loop)


def length(o: TrainRankdpo, about: About) -> Length:
    """Batch and steps, counted in prompts; if the rankings are on this disk, also their pictures and evaluations."""
    found = length_of(o, about, "prompts")
    return found if about.items is None else found.with_lines([*found.lines, *describe_lists(o, about.items)])


def describe_lists(o: TrainRankdpo, rankings: Sequence[Ranking]) -> list[str]:
    """How many pictures the rankings have, what they cost, and where the loss starts (all scores are 0)."""
    lengths = Counter(len(ranking.pictures) for ranking in rankings)
    start = weight = 0.0
    for ranking in rankings:
        phi = torch.tensor([ranking.relevance], dtype=torch.float64)
        start += float(rank_dpo(0 * phi, phi, 1.0, pair_norm=o.pair_norm, discount=o.discount)) / len(rankings)
        weight += float(gain_weights(phi, o.discount).triu().sum()) / len(rankings)
    k = max(lengths)
    more = f" + {k} without" if o.one_picture_at_a_time else ""
    return [
        f"pictures         {', '.join(f'{k} for each of {n} prompts' for k, n in sorted(lengths.items()))}",
        f"evaluations      of {k} pictures: {k} policy with gradient{more} + {k} reference, {k * (k - 1) // 2} pairs",
        f"loss             starts at {start:.4f}, reaches (0, inf); a prompt's pairs weigh {weight:.4f} together",
    ]


METHOD = Entry(
    verb="train rankdpo",
    data="rankings",
    shown=("implicit_accuracy",),
    require=require_accumulation,
    length=length,
    constants=describe_beta,
    start=start,
)
