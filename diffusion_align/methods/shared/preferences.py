"""Training a step-aware preference model on cached pairs (Liang et al. 2024, arXiv 2406.04314, section 4.1).

A pair is noised to one random timestep with one noise, the frozen base predicts both clean pictures in one evaluation
with guidance, and the scorer learns to predict from them which picture was preferred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_align import rng
from diffusion_align.data.cache import PairCache
from diffusion_align.objectives import implicit_accuracy
from diffusion_align.prediction import add_noise
from diffusion_align.schedule import Schedule
from diffusion_align.tensors import require_same_shape, widen
from diffusion_align.train.method import Columns, OfflineMethod, Sample
from diffusion_align.train.run import Run

TIMESTEPS = (0, 251, 501, 701, 951)
"""The timesteps, of 1000, at which the authors measure accuracy."""

PredictClean = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(x [B,C,h,w], t [B], text [B,L,E]) -> x0 [B,C,h,w]`: the frozen base with guidance and negative prompt."""

StepScore = Callable[[Tensor, list[str], Tensor], Tensor]
"""`(pictures or latents [B,...], B prompts, t [B]) -> [B]`; with gradient while it is trained."""


def preference_loss(score_w: Tensor, score_l: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of softmax([score_w, score_l]) against [label, 1 - label], minus the label's entropy, [B].

    `label` is 1 if the first is preferred, 0.5 for a tie. Subtracting the entropy (log 2 for a tie) makes the minimum 0
    for every label, as in the authors' code; the gradient is the same. Raises ValueError for unequal shapes.
    """
    require_same_shape(score_w=score_w, score_l=score_l, label=label)
    gap = widen(score_w) - widen(score_l)
    label = label.to(gap)
    entropy = -torch.xlogy(label, label) - torch.xlogy(1 - label, 1 - label)
    return F.binary_cross_entropy_with_logits(gap, label, reduction="none") - entropy


def prompt_weights(prompts: Sequence[str]) -> Tensor:
    """[N] float64, one over the number of pairs of the same prompt, so that all prompts count equally."""
    pairs = Counter(prompts)
    return torch.tensor([1 / pairs[prompt] for prompt in prompts], dtype=torch.float64)


def predicted_pairs(
    predict_clean: PredictClean, latents: Tensor, text: Tensor, t: Tensor, noise: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Clean predictions [2B,C,h,w] of pairs [B,2,C,h,w], winners first, at t [B] with noise [B,C,h,w]; and t [2B].

    Both share the noise, so the predictions differ by the pictures only. One call of the base, without gradient.
    """
    clean, noise = latents.transpose(0, 1).flatten(0, 1), noise.to(latents).repeat(2, 1, 1, 1)
    t = t.repeat(2)
    x = add_noise(clean, noise, schedule.alpha(t).to(latents), schedule.sigma(t).to(latents))
    t = t.to(latents.device)
    with torch.no_grad():
        return predict_clean(x, t, text.repeat(2, *[1] * (text.ndim - 1))), t


@dataclass(frozen=True, eq=False)
class PreferencePairs:
    """Pairs to learn preferences from, and the frozen base that predicts their pictures at a noise level.

    prompts: of the cache's pairs, by index. predict_clean: the base with guidance. decode: clean latents -> input of
    the scorer (pictures, or the latents themselves). labels: [len(cache)] probability that the first of a pair is
    preferred; None: 1. Raises ValueError unless there are one prompt and one label per pair.
    """

    cache: PairCache
    prompts: Sequence[str]
    predict_clean: PredictClean
    decode: Callable[[Tensor], Tensor]
    schedule: Schedule
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.wanted) == len(self.cache):
            counts = f"{len(self.prompts)} prompts and {len(self.wanted)} labels"
            raise ValueError(f"{len(self.cache)} pairs have {counts}")

    @cached_property
    def wanted(self) -> Tensor:
        """[len(cache)], the labels."""
        return torch.ones(len(self.cache)) if self.labels is None else self.labels.cpu()


def preference_method(pairs: PreferencePairs, scorer: StepScore, run: Run) -> OfflineMethod:
    """Training of a step-aware scorer, such as `rewards.step_aware_model.StepAware`.

    Timesteps are uniform over 0..N-1. The loss is the mean over the whole batch of a step, whatever its micro-batches.
    The weight of a pair is one over the number of pairs of its prompt.

    Metrics: accuracy (of the batch, at its own random noise levels), margin (mean of winner's score minus loser's).
    """
    weights = prompt_weights(pairs.prompts)

    def micro_batch(samples: list[Sample], of_step: list[Sample]) -> Columns:
        rows = [index for _, index in samples]
        latents, text = (tensor.to(run.accelerator.device) for tensor in pairs.cache.batch(rows))
        t = rng.integers_batch(0, pairs.schedule.num_timesteps, run.seed, "timestep", samples)
        noise = rng.normal_batch(latents.shape[2:], run.seed, "noise", samples)
        with run.accelerator.autocast():
            clean, times = predicted_pairs(pairs.predict_clean, latents, text, t, noise, pairs.schedule)
            with torch.no_grad():
                seen = pairs.decode(clean)
            winner, loser = scorer(seen, [pairs.prompts[row] for row in rows] * 2, times).chunk(2)
        loss = preference_loss(winner, loser, pairs.wanted[rows].to(winner.device))
        weight = (weights[rows] / weights[[index for _, index in of_step]].mean()).to(loss)
        return {"loss": loss * weight, "margin": (winner - loser).detach(), "label": pairs.wanted[rows].to(loss)}

    def summarise(columns: Columns) -> dict[str, float]:
        right = _ranked_right(columns["margin"], columns["label"])
        return {"accuracy": float(right.nanmean()), "margin": float(columns["margin"].mean())}

    return OfflineMethod(len(pairs.cache), micro_batch, summarise)


def accuracy_by_noise(
    pairs: PreferencePairs,
    score: StepScore,
    *,
    seed: int,
    timesteps: Sequence[int] = TIMESTEPS,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """The fraction of pairs that `score` ranks as labelled, by timestep; equal scores count half, ties do not count.

    Noise is addressed by (seed, "evaluation noise", pair), the same at every timestep and before and after training.
    """
    found = {}
    for time in timesteps:
        right = []
        for start in range(0, len(pairs.cache), batch_size):
            rows = list(range(start, min(start + batch_size, len(pairs.cache))))
            latents, text = (tensor.to(device) for tensor in pairs.cache.batch(rows))
            noise = rng.normal_batch(latents.shape[2:], seed, "evaluation noise", rows)
            with torch.no_grad():
                t = torch.full((len(rows),), time)
                clean, times = predicted_pairs(pairs.predict_clean, latents, text, t, noise, pairs.schedule)
                seen, prompts = pairs.decode(clean), [pairs.prompts[row] for row in rows] * 2
                winner, loser = score(seen, prompts, times).cpu().chunk(2)
            right.append(_ranked_right(winner - loser, pairs.wanted[rows]))
        found[time] = float(torch.cat(right).nanmean())
    return found


def _ranked_right(margin: Tensor, label: Tensor) -> Tensor:
    """1, 0 or 0.5 per pair: whether the margin agrees with the label; NaN for a tie, which has no right order."""
    return torch.where(label == 0.5, torch.nan, implicit_accuracy(margin * (label - 0.5).sign()))
