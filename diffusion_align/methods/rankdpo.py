"""`train rankdpo`: RankDPO on rankings of pictures (Karthik et al. 2024, arXiv 2410.18013).

A picture's score is minus the paper's s, its gap of denoising errors: by how much the policy's error lies below the
reference's. The loss couples the K scores of a prompt, but its gradient is a sum over pictures of dL/dscore_i times the
gradient of one error, so K pictures need no more network memory than one.
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
from diffusion_align.methods.shared.metrics import quantiles
from diffusion_align.methods.shared.noising import (
    Networks,
    Noised,
    Predict,
    denoising_errors,
    drop_captions,
    noised_lists,
)
from diffusion_align.methods.shared.plan import describe_beta, latent_beta, length_of, require_accumulation
from diffusion_align.methods.shared.start_checks import apart, between_outputs, require_equal_outputs
from diffusion_align.objectives import best_and_worst, gain_weights, implicit_accuracy, rank_dpo
from diffusion_align.options import TrainRankdpo
from diffusion_align.train.method import Columns, OfflineMethod, Sample
from diffusion_align.train.run import Run, StepRecord
from diffusion_align.train.steps import run_steps


def ranking_scores(predict_policy: Predict, predict_reference: Predict, noised: Noised, *, one_graph: bool) -> Tensor:
    """Reference's minus policy's squared errors, summed over dims in float32, [B,K]; the gradient is the policy's.

    Either all K B rows in one call of each network, or with `one_graph` one picture of each list at a time: its graph
    is thrown away, and made again when the loss is differentiated. The gradient is the same; activations are those of
    B rows instead of K B, and the policy is evaluated twice.
    """
    if not one_graph:
        with torch.no_grad():
            reference = denoising_errors(predict_reference, noised)
        return reference - denoising_errors(predict_policy, noised)
    parts = [part.chunk(noised.entries) for part in noised[:4]]
    scores = []
    for x, t, text, wanted in zip(*parts, strict=True):
        alone = Noised(x, t, text, wanted, 1)
        with torch.no_grad():
            reference = denoising_errors(predict_reference, alone)
        # Nothing in the networks is random, so no generator's state has to be kept for the second time.
        policy = checkpoint(denoising_errors, predict_policy, alone, use_reentrant=False, preserve_rng_state=False)
        scores.append(reference - policy)
    return torch.cat(scores, 1)


@dataclass(frozen=True)
class RankingLoss:
    """A loss of rankings with its constants.

    of_scores: (minus the error gaps [b,K], relevance [b,K]) -> [b], beta bound; `objectives.rank_dpo`.
    pair_weights: relevance [b,K] -> [b,K,K], what a pair counts in the metrics; `objectives.gain_weights`.
    beta: the loss's own, here only to report margins as logits.
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

    Metrics, w and l being a prompt's most and least relevant picture: implicit_accuracy, of all pairs by weight;
    winner_error_gap and loser_error_gap, policy minus reference on w and l, mean over dims; margin_p05, margin_p50,
    margin_p95 of beta (score_w - score_l); pair_weight, the mean sum of a prompt's weights.

    Raises ValueError for relevance that does not fit the cache, or networks without a reference.
    """
    if [len(shares) for shares in relevance] != cache.lengths:
        raise ValueError(
            f"relevance of {len(relevance)} rankings does not fit the {len(cache)} in the cache, or their K"
        )
    if networks.reference is None:
        raise ValueError("RankDPO compares with the frozen reference: give networks that have one")
    reference, dims = networks.reference, [0]

    def of_one_length(samples: list[Sample]) -> Columns:
        indices = [index for _, index in samples]
        latents, text = (part.to(run.accelerator.device) for part in cache.batch(indices))
        text = drop_captions(text, cache.empty_text, samples, caption_dropout, run.seed)
        noised = noised_lists(latents, text, samples, networks, run.seed, shared_noise=shared_noise)
        dims[:] = [latents[0, 0].numel()]
        mine: list[Tensor] = []
        theirs: list[Tensor] = []
        with run.accelerator.autocast():
            scores = ranking_scores(noted(networks.policy, mine), noted(reference, theirs), noised, one_graph=one_graph)
        phi = torch.tensor([relevance[index] for index in indices], dtype=torch.float64).to(scores)
        columns = {"loss": loss.of_scores(scores, phi), **_columns(scores.detach(), phi, loss.pair_weights(phi))}
        return columns | ({"apart": apart(torch.cat(mine), torch.cat(theirs), noised.entries)} if check_start else {})

    def micro_batch(samples: list[Sample], _: list[Sample]) -> Columns:
        lengths = [cache.lengths[index] for _, index in samples]
        parts = [
            of_one_length([sample for sample, k in zip(samples, lengths, strict=True) if k == length])
            for length in sorted(set(lengths))
        ]
        # Rows are now in the order of their lengths, which does not matter to a mean.
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def summarise(columns: Columns) -> dict[str, float]:
        weight = columns["weight"].sum()
        return {
            "implicit_accuracy": float(columns["right"].sum() / weight),
            "winner_error_gap": float(columns["winner_gap"].mean() / dims[0]),
            "loser_error_gap": float(columns["loser_gap"].mean() / dims[0]),
            **quantiles("margin", loss.beta * columns["margin"]),
            "pair_weight": float(weight / len(columns["margin"])),
        }

    check = partial(require_equal_outputs, allowed=between_outputs(run.accelerator)) if check_start else None
    return OfflineMethod(len(cache), micro_batch, summarise, check)


def noted(predict: Predict, outputs: list[Tensor]) -> Predict:
    """The same network, which puts what it answers into a list as well, without its graph."""

    def answer(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        output = predict(x, t, text)
        outputs.append(output.detach())
        return output

    return answer


def _columns(scores: Tensor, relevance: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What is reported of scores [b,K], [b] each."""
    weights = weights * (relevance[:, :, None] > relevance[:, None, :])  # [b,i,j]: i is to be preferred to j
    right = implicit_accuracy(scores[:, :, None] - scores[:, None, :])
    best, worst, _ = best_and_worst(relevance)
    winner, loser = (scores.gather(1, place[:, None])[:, 0] for place in (best, worst))
    return {
        "right": (weights * right).sum((1, 2)),
        "weight": weights.sum((1, 2)),
        "winner_gap": 0 - winner,  # not -winner, which at the start would be the -0.0 of metrics.jsonl
        "loser_gap": 0 - loser,
        "margin": winner - loser,
    }


def start(o: TrainRankdpo, opened: Opened) -> Started:
    """Encode the rankings. How a batch is cut into micro-batches, processes and pictures may change on a resume."""
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

    labels = digest(json.dumps(relevance).encode())  # the cache does not know them
    return Started(len(cache), cache.identity | {"beta": beta, "relevance": labels}, loop)


def length(o: TrainRankdpo, about: About) -> Length:
    """Batch and steps, counted in prompts; with the rankings at hand also their pictures and evaluations."""
    found = length_of(o, about, "prompts")
    return found if about.items is None else found.with_lines([*found.lines, *describe_lists(o, about.items)])


def describe_lists(o: TrainRankdpo, rankings: Sequence[Ranking]) -> list[str]:
    """How long the lists are, what they cost, and where the loss starts: all scores are 0 then."""
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
