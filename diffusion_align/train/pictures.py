"""Diffusion-KTO's loop over single pictures that are liked or disliked (Li et al. 2024, arXiv 2404.04465).

A pair gives two such pictures, its winner and its loser, and each visit takes one of them. Every picture has its own
timestep and noise. The loss compares a picture's gain over the reference with the gain of the whole batch, over all
micro-batches and processes: the baseline is known before any gradient (`steps.Survey`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from diffusion_align import rng
from diffusion_align.data.cache import PairCache
from diffusion_align.objectives import implicit_accuracy, kto
from diffusion_align.schedule import Schedule
from diffusion_align.tensors import sum_dims, widen
from diffusion_align.train.offline import Noised, Predict, apart, drop_captions, noised_lists, require_start
from diffusion_align.train.record import quantiles
from diffusion_align.train.rounding import between_outputs
from diffusion_align.train.steps import Progress, Sample, StepRecord, Survey, run_steps

if TYPE_CHECKING:
    from accelerate import Accelerator


def liked_of(samples: Sequence[Sample], share: float, seed: int) -> Tensor:
    """Which of these visits [b] show the pair's winner, the others its loser: bool, addressed by (epoch, index)."""
    return rng.uniform_batch(seed, "liked", list(samples)) < share


def baseline_of(log_ratio: Tensor) -> Tensor:
    """The mean log-ratio of a batch [B], at least 0, as in the authors' code: a number without gradient."""
    return log_ratio.detach().to(torch.float64).mean().clamp(min=0)


def train_pictures(
    cache: PairCache,
    predict_policy: Predict,
    predict_reference: Predict,
    *,
    schedule: Schedule,
    prediction_type: str,
    beta: float,
    liked_share: float,
    parameters: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
    max_steps: int,
    accumulation: int = 1,
    caption_dropout: float = 0.0,
    max_grad_norm: float | None = 1.0,
    progress: Progress | None = None,
    max_skipped_in_row: int = 5,
    spike: float | None = None,
    check_start: bool = True,
    weights: Sequence[float] | None = None,
) -> Iterator[StepRecord]:
    """Train on single pictures out of pairs with `objectives.kto`; yields after each optimizer step.

    One policy call and one reference call per micro-batch, on b rows. Where a step has more than one micro-batch, each
    costs one more policy call without gradients, for the baseline of the whole batch; so how a batch is cut into
    micro-batches and processes changes only the rounding.

    Args:
        beta: per squared error summed over dims; `objectives.beta_per_squared_error` of a published one ("diffusers").
        liked_share: probability that a visit shows the winner (0.8 in the authors' launcher).
        batch_size: pictures per optimizer step, over all processes and micro-batches.
        weights: [len(cache)] factors on the losses of a pair's pictures; None: 1 each.
        Others as in `offline.train_pairs`.

    Metrics: implicit_accuracy, the share of pictures whose log-ratio has its label's sign; winner_error_gap and
    loser_error_gap, policy minus reference on liked and disliked pictures, mean over dims (absent where a step shows
    none of them); baseline_logit, beta times the baseline; log_ratio_p05, _p50, _p95 of beta times the log-ratio;
    grad_norm, lr, samples, skipped.

    Raises:
        RuntimeError: policy and reference differ before the first update (see `check_start`).
        ValueError: a share outside [0, 1], a wrong number of weights, or as `steps.run_steps`.
        NonFiniteError: as there.
    """
    if not 0 <= liked_share <= 1:
        raise ValueError(f"liked_share must lie in [0, 1], got {liked_share}")
    if weights is not None and len(weights) != len(cache):
        raise ValueError(f"expected {len(cache)} weights, one a pair, got {len(weights)}")
    of_pair = torch.ones(len(cache)) if weights is None else torch.tensor(weights, dtype=torch.float32)
    dims: list[int] = []
    # Of this step's survey: what `by_reference` found on each micro-batch, and the whole batch's baseline.
    reference: dict[tuple[Sample, ...], tuple[Tensor, Tensor]] = {}
    surveyed: list[Tensor] = []

    def noised_pictures(samples: list[Sample]) -> tuple[Noised, Tensor]:
        latents, text = cache.batch([index for _, index in samples])
        liked = liked_of(samples, liked_share, seed)
        shown = latents[torch.arange(len(samples)), (~liked).long()].to(accelerator.device)
        text = drop_captions(text.to(accelerator.device), cache.empty_text, samples, caption_dropout, seed)
        dims[:] = [shown[0].numel()]
        return noised_lists(shown[:, None], text, samples, schedule, prediction_type, seed), liked.to(shown.device)

    def errors_of(output: Tensor, noised: Noised) -> Tensor:
        return sum_dims((widen(output) - widen(noised.target)).square())

    def by_reference(noised: Noised, policy: Tensor) -> tuple[Tensor, Tensor]:
        """The reference's errors [b], and how far its outputs are from the policy's."""
        with torch.no_grad(), accelerator.autocast():
            output = predict_reference(noised.x, noised.t, noised.text)
        return errors_of(output, noised), apart(policy, output, 1)

    def by_policy(noised: Noised) -> Tensor:
        with accelerator.autocast():
            return predict_policy(noised.x, noised.t, noised.text)

    def look(samples: list[Sample]) -> dict[str, Tensor]:
        noised, _ = noised_pictures(samples)
        output = by_policy(noised)
        reference[tuple(samples)] = by_reference(noised, output)
        return {"log_ratio": reference[tuple(samples)][0] - errors_of(output, noised)}

    def hear(columns: dict[str, Tensor]) -> None:
        surveyed[:] = [baseline_of(columns["log_ratio"])]

    def micro_batch(samples: list[Sample], _: list[Sample]) -> dict[str, Tensor]:
        noised, liked = noised_pictures(samples)
        output = by_policy(noised)
        known = reference.pop(tuple(samples), None)
        errors, distance = by_reference(noised, output) if known is None else known
        log_ratio = errors - errors_of(output, noised)
        baseline = baseline_of(log_ratio) if len(samples) == batch_size else surveyed[0]
        losses = kto(log_ratio, liked, float(baseline), beta) * of_pair[[i for _, i in samples]].to(log_ratio)
        columns = {"loss": losses, "log_ratio": log_ratio, "liked": liked.to(losses)}
        return columns | ({"apart": distance} if check_start else {})

    def summarise(columns: dict[str, Tensor]) -> dict[str, float]:
        log_ratio, liked = columns["log_ratio"], columns["liked"] == 1
        sides = {"winner_error_gap": -log_ratio[liked], "loser_error_gap": -log_ratio[~liked]}
        return {
            "implicit_accuracy": float(implicit_accuracy(torch.where(liked, log_ratio, -log_ratio)).mean()),
            **{name: float(gap.mean() / dims[0]) for name, gap in sides.items() if len(gap)},
            "baseline_logit": beta * float(baseline_of(log_ratio)),
            **quantiles("log_ratio", beta * log_ratio),
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
        survey=Survey(look, hear),
    )
