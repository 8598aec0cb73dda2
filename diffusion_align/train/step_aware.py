"""Training SPO's step-aware preference model on cached pairs (Liang et al. 2024, arXiv 2406.04314, section 4.1).

A pair is noised to one random timestep with one noise, the frozen base predicts both clean pictures in one evaluation
with guidance, and the model learns to tell from these predictions which picture was preferred. The authors' settings
for Stable Diffusion 1.5, from PickScore on Pick-a-Pic v1: guidance 5, AdamW with weight decay 0.3, learning rate 3e-6
after 500 steps of warm-up, gradients clipped to 1, 8000 steps of 4 x 16 pairs; for SDXL 1e-6 and 7000 steps.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from diffusion_align import rng
from diffusion_align.data.cache import PairCache
from diffusion_align.objectives import implicit_accuracy
from diffusion_align.prediction import add_noise
from diffusion_align.schedule import Schedule
from diffusion_align.tensors import require_same_shape, widen
from diffusion_align.train.steps import Progress, Sample, StepRecord, run_steps
from diffusion_align.train.update import first_progress

if TYPE_CHECKING:
    from accelerate import Accelerator

TIMESTEPS = (0, 251, 501, 701, 951)
"""Where the authors measure accuracy, of a schedule of 1000."""

PredictClean = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(x [B,C,h,w], t [B], text [B,L,E]) -> x0 [B,C,h,w]`: the frozen base, guidance and negative prompt bound."""

StepScore = Callable[[Tensor, list[str], Tensor], Tensor]
"""`(pictures or latents [B,...], B prompts, t [B]) -> [B]`; with gradient where it is trained."""


def preference_loss(score_w: Tensor, score_l: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of softmax([score_w, score_l]) against [label, 1 - label], minus the label's entropy, [B].

    `label` is 1 where the first is preferred, 0.5 for a tie. Without its entropy, log 2 for a tie, every label's least
    loss is 0, as in the authors' code; the gradient is the same. Raises ValueError unless all are of one shape.
    """
    require_same_shape(score_w=score_w, score_l=score_l, label=label)
    gap = widen(score_w) - widen(score_l)
    label = label.to(gap)
    entropy = -torch.xlogy(label, label) - torch.xlogy(1 - label, 1 - label)
    return F.binary_cross_entropy_with_logits(gap, label, reduction="none") - entropy


def prompt_weights(prompts: Sequence[str]) -> Tensor:
    """[N] float64, one over the number of pairs that share the prompt: every prompt counts the same."""
    pairs = Counter(prompts)
    return torch.tensor([1 / pairs[prompt] for prompt in prompts], dtype=torch.float64)


def predicted_pairs(
    predict_clean: PredictClean, latents: Tensor, text: Tensor, t: Tensor, noise: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Clean predictions [2B,C,h,w] of pairs [B,2,C,h,w], winners first, at t [B] with noise [B,C,h,w]; and t [2B].

    One noise serves both, so that only the pictures make the difference. One call of the base, without gradient.
    """
    clean, noise = latents.transpose(0, 1).flatten(0, 1), noise.to(latents).repeat(2, 1, 1, 1)
    t = t.repeat(2)
    x = add_noise(clean, noise, schedule.alpha(t).to(latents), schedule.sigma(t).to(latents))
    t = t.to(latents.device)
    with torch.no_grad():
        return predict_clean(x, t, text.repeat(2, *[1] * (text.ndim - 1))), t


def train_step_aware(
    cache: PairCache,
    prompts: Sequence[str],
    model: StepScore,
    predict_clean: PredictClean,
    decode: Callable[[Tensor], Tensor],
    *,
    schedule: Schedule,
    parameters: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    accelerator: "Accelerator",
    batch_size: int,
    seed: int,
    max_steps: int,
    accumulation: int = 1,
    labels: Tensor | None = None,
    max_grad_norm: float | None = 1.0,
    progress: Progress | None = None,
    max_skipped_in_row: int = 5,
    spike: float | None = None,
) -> Iterator[StepRecord]:
    """Train a step-aware model; yields after each optimizer step.

    Timesteps are uniform over 0..N-1. The loss is the mean over the whole batch of a step, whatever pieces it is cut
    into, each pair weighing one over the number of pairs of its prompt.

    Args:
        prompts: of the cache's pairs, by index.
        model: the scores to train, such as `rewards.step_aware_model.StepAware`.
        decode: clean latents -> what the scorer reads: the model's decode, or the latents as they are.
        labels: [len(cache)] probability that the first of a pair is preferred; None: always.
        batch_size: pairs per optimizer step, over all processes and pieces.

    Metrics: accuracy (of the batch, at its own random noise levels), margin (mean of winner's score minus loser's).

    Raises:
        ValueError: prompts or labels that are not one per pair; settings as `steps.run_steps`.
        NonFiniteError: as `steps.run_steps`.
    """
    wanted, weights = _labels(labels, prompts, cache), prompt_weights(prompts)
    progress = progress or first_progress(accelerator.mixed_precision)

    def micro_batch(samples: list[Sample], of_step: list[Sample]) -> dict[str, Tensor]:
        rows = [index for _, index in samples]
        latents, text = (part.to(accelerator.device) for part in cache.batch(rows))
        t = rng.integers_batch(0, schedule.num_timesteps, seed, "timestep", samples)
        noise = rng.normal_batch(latents.shape[2:], seed, "noise", samples)
        with accelerator.autocast():
            clean, times = predicted_pairs(predict_clean, latents, text, t, noise, schedule)
            with torch.no_grad():
                seen = decode(clean)
            winner, loser = model(seen, [prompts[row] for row in rows] * 2, times).chunk(2)
        loss = preference_loss(winner, loser, wanted[rows].to(winner.device))
        share = (weights[rows] / weights[[index for _, index in of_step]].mean()).to(loss)
        return {"loss": loss * share, "margin": (winner - loser).detach(), "label": wanted[rows].to(loss)}

    def summarise(columns: dict[str, Tensor]) -> dict[str, float]:
        right = _ranked_right(columns["margin"], columns["label"])
        return {"accuracy": float(right.nanmean()), "margin": float(columns["margin"].mean())}

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
        progress=progress,
        max_skipped_in_row=max_skipped_in_row,
        spike=spike,
    )


def accuracy_by_noise(
    cache: PairCache,
    prompts: Sequence[str],
    score: StepScore,
    predict_clean: PredictClean,
    decode: Callable[[Tensor], Tensor],
    *,
    schedule: Schedule,
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int,
    batch_size: int = 32,
    labels: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """The share of pairs that `score` ranks as labelled at each timestep; equal scores count half, ties do not count.

    Noise is addressed by (seed, "evaluation noise", pair), the same at every timestep and before and after training.
    """
    wanted, found = _labels(labels, prompts, cache), {}
    for time in timesteps:
        right = []
        for start in range(0, len(cache), batch_size):
            rows = list(range(start, min(start + batch_size, len(cache))))
            latents, text = (part.to(device) for part in cache.batch(rows))
            noise = rng.normal_batch(latents.shape[2:], seed, "evaluation noise", rows)
            with torch.no_grad():
                t = torch.full((len(rows),), time)
                clean, times = predicted_pairs(predict_clean, latents, text, t, noise, schedule)
                winner, loser = score(decode(clean), [prompts[row] for row in rows] * 2, times).cpu().chunk(2)
            right.append(_ranked_right(winner - loser, wanted[rows]))
        found[time] = float(torch.cat(right).nanmean())
    return found


def _labels(labels: Tensor | None, prompts: Sequence[str], cache: PairCache) -> Tensor:
    labels = torch.ones(len(cache)) if labels is None else labels.cpu()
    if not len(prompts) == len(labels) == len(cache):
        raise ValueError(f"{len(cache)} pairs have {len(prompts)} prompts and {len(labels)} labels")
    return labels


def _ranked_right(margin: Tensor, label: Tensor) -> Tensor:
    """1, 0 or 0.5 per pair, as the margin agrees with the label; NaN for a tie, which has no right order."""
    return torch.where(label == 0.5, torch.nan, implicit_accuracy(margin * (label - 0.5).sign()))
