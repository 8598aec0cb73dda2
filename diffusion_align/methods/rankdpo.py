"""RankDPO's loop over cached rankings (Karthik et al. 2024, arXiv 2410.18013), on the pieces of `offline`.

A picture's score is minus the paper's s, its gap of denoising errors: by how much the policy's error lies below the
reference's. The loss couples the K scores of a prompt, but its gradient is a sum over pictures of dL/dscore_i times the
gradient of one error, so K pictures need no more network memory than one.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from diffusion_align.data.cache import PairCache
from diffusion_align.objectives import best_and_worst, implicit_accuracy
from diffusion_align.schedule import Schedule
from diffusion_align.train.offline import (
    Noised,
    Predict,
    apart,
    denoising_errors,
    drop_captions,
    noised_lists,
    require_start,
)
from diffusion_align.train.record import quantiles
from diffusion_align.train.rounding import between_outputs
from diffusion_align.train.steps import Progress, Sample, StepRecord, run_steps

if TYPE_CHECKING:
    from accelerate import Accelerator


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


def train_rankings(
    cache: PairCache,
    relevance: Sequence[Sequence[float]],
    predict_policy: Predict,
    predict_reference: Predict,
    *,
    schedule: Schedule,
    prediction_type: str,
    loss: Callable[[Tensor, Tensor], Tensor],
    pair_weights: Callable[[Tensor], Tensor],
    beta: float,
    parameters: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    accelerator: "Accelerator",
    batch_size: int,
    seed: int,
    max_steps: int,
    shared_noise: bool = False,
    one_graph: bool = False,
    accumulation: int = 1,
    caption_dropout: float = 0.0,
    max_grad_norm: float | None = 1.0,
    progress: Progress | None = None,
    max_skipped_in_row: int = 5,
    spike: float | None = None,
    check_start: bool = True,
) -> Iterator[StepRecord]:
    """Train on rankings with a loss of their scores; yields after each optimizer step, as `offline.train_pairs`.

    For each prompt K evaluations of the policy and K of the reference, for K (K - 1) / 2 pairs; with `one_graph` K more
    of the policy. Lists of several lengths may share a step: those of one length go through the networks together.

    Args:
        relevance: [len(cache)][K], higher is better, in the order of the cache.
        loss: minus the error gaps [b,K] and relevance [b,K] -> [b], beta already bound; `objectives.rank_dpo`.
        pair_weights: relevance [b,K] -> [b,K,K], what a pair counts in the metrics; `objectives.gain_weights`.
        beta: the loss's own, here only to report margins as logits.
        batch_size: prompts per optimizer step, over all processes and pieces.
        shared_noise: one noise for the K pictures of a prompt, as in Diffusion-DPO; the paper has K.
        one_graph: keep the network's activations for one picture of a prompt at a time.

    The other arguments are those of `train_pairs`. Metrics, w and l being a prompt's most and least relevant picture:
    implicit_accuracy, of all pairs by weight; winner_error_gap and loser_error_gap, policy minus reference on w and l,
    mean over dims; margin_p05, margin_p50, margin_p95 of beta (score_w - score_l); pair_weight, the mean sum of a
    prompt's weights; and grad_norm, lr, samples, skipped.

    Raises:
        RuntimeError: policy and reference differ before the first update (see `check_start`).
        ValueError: relevance that does not fit the cache.
        ValueError, NonFiniteError: as `steps.run_steps`.
    """
    if [len(shares) for shares in relevance] != cache.lengths:
        raise ValueError(
            f"relevance of {len(relevance)} rankings does not fit the {len(cache)} in the cache, or their K"
        )
    dims: list[int] = []

    def of_one_length(samples: list[Sample]) -> dict[str, Tensor]:
        indices = [index for _, index in samples]
        latents, text = (part.to(accelerator.device) for part in cache.batch(indices))
        text = drop_captions(text, cache.empty_text, samples, caption_dropout, seed)
        noised = noised_lists(
            latents, text, samples, schedule, prediction_type, seed, shared_noise=shared_noise
        )  # fmt: skip
        dims[:] = [latents[0, 0].numel()]
        mine: list[Tensor] = []
        theirs: list[Tensor] = []
        with accelerator.autocast():
            scores = ranking_scores(
                noted(predict_policy, mine), noted(predict_reference, theirs), noised, one_graph=one_graph
            )
        phi = torch.tensor([relevance[index] for index in indices], dtype=torch.float64).to(scores)
        columns = {"loss": loss(scores, phi), **_columns(scores.detach(), phi, pair_weights(phi))}
        return columns | ({"apart": apart(torch.cat(mine), torch.cat(theirs), noised.entries)} if check_start else {})

    def micro_batch(samples: list[Sample], _: list[Sample]) -> dict[str, Tensor]:
        lengths = [cache.lengths[index] for _, index in samples]
        parts = [
            of_one_length([sample for sample, k in zip(samples, lengths, strict=True) if k == length])
            for length in sorted(set(lengths))
        ]
        # Rows are now in the order of their lengths, which no mean feels.
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def summarise(columns: dict[str, Tensor]) -> dict[str, float]:
        weight = columns["weight"].sum()
        return {
            "implicit_accuracy": float(columns["right"].sum() / weight),
            "winner_error_gap": float(columns["winner_gap"].mean() / dims[0]),
            "loser_error_gap": float(columns["loser_gap"].mean() / dims[0]),
            **quantiles("margin", beta * columns["margin"]),
            "pair_weight": float(weight / len(columns["margin"])),
        }

    return run_steps(
        micro_batch,
        summarise,
        n=len(cache),
        parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        accelerator=accelerator,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        max_steps=max_steps,
        max_grad_norm=max_grad_norm,
        progress=progress or Progress(),
        max_skipped_in_row=max_skipped_in_row,
        spike=spike,
        check_first=partial(require_start, allowed=between_outputs(accelerator)) if check_start else None,
    )


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
