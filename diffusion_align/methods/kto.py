"""`train dpo`, loss type kto: Diffusion-KTO on single liked or disliked pictures (Li et al. 2024, arXiv 2404.04465).

A pair provides two such pictures, its winner and its loser; each visit to the pair takes one of them. Every picture has
its own timestep and noise. The loss compares the gain of a picture over the reference with the mean gain of the batch,
over all micro-batches and ranks. A `train.method.Survey` computes that baseline before any gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.data.cache import PairCache
from diffusion_align.methods.shared.metrics import mean_over_dims, quantiles
from diffusion_align.methods.shared.noising import Networks, Noised, drop_captions, noised_lists, pick
from diffusion_align.methods.shared.start_checks import apart, between_outputs, require_equal_outputs
from diffusion_align.objectives import implicit_accuracy, kto
from diffusion_align.tensors import sum_dims, widen
from diffusion_align.train.method import Columns, OfflineMethod, Sample, Survey
from diffusion_align.train.run import Run


def liked_of(samples: Sequence[Sample], share: float, seed: int) -> Tensor:
    """[b] bool: whether a visit shows the winner of the pair, not the loser; addressed by (epoch, index)."""
    return rng.uniform_batch(seed, "liked", list(samples)) < share


def baseline_of(log_ratio: Tensor) -> Tensor:
    """The mean log-ratio of a batch [B], but at least 0, as in the authors' code; without gradient."""
    return log_ratio.detach().to(torch.float64).mean().clamp(min=0)


def pictures_method(
    cache: PairCache,
    networks: Networks,
    run: Run,
    *,
    beta: float,
    liked_share: float,
    caption_dropout: float = 0.0,
    weights: Sequence[float] | None = None,
    check_start: bool = True,
) -> OfflineMethod:
    """Training on single pictures of pairs with `objectives.kto`.

    A micro-batch of b pictures costs one policy call and one reference call. If a step has more than one micro-batch,
    each costs one more policy call without gradients, for the baseline of the whole batch. So the split of a batch into
    micro-batches and ranks changes only the rounding.

    Args:
        beta: per squared error summed over dims; `objectives.beta_per_squared_error` of a published one ("diffusers").
        liked_share: probability that a visit shows the winner (0.8 in the authors' launcher).
        weights: [len(cache)] factors of the losses of a pair's pictures; None: 1 each.
        Others as in `dpo.pairs_method`.

    Metrics: implicit_accuracy, the fraction of pictures whose log-ratio has the sign of their label; winner_error_gap
    and loser_error_gap, policy minus reference on liked and disliked pictures, mean over dims (absent if a step has no
    such picture); baseline_logit, beta times the baseline; log_ratio_p05, _p50, _p95 of beta times the log-ratio.

    Raises ValueError for a `liked_share` outside [0, 1] or a wrong number of weights.
    """
    if not 0 <= liked_share <= 1:
        raise ValueError(f"liked_share must lie in [0, 1], got {liked_share}")
    if weights is not None and len(weights) != len(cache):
        raise ValueError(f"expected {len(cache)} weights, one per pair, got {len(weights)}")
    of_pair = torch.ones(len(cache)) if weights is None else torch.tensor(weights, dtype=torch.float32)
    visits = _Visits(cache, networks, run, liked_share, caption_dropout)

    def micro_batch(samples: list[Sample], of_step: list[Sample]) -> Columns:
        noised, liked = visits.noised(samples)
        output = visits.policy(noised)
        errors, distance = visits.reference(samples, noised, output)
        log_ratio = errors - _errors(output, noised)
        baseline = baseline_of(log_ratio) if len(samples) == len(of_step) else visits.baseline
        losses = kto(log_ratio, liked, float(baseline), beta) * of_pair[[i for _, i in samples]].to(log_ratio)
        columns = {"loss": losses, "log_ratio": log_ratio, "liked": liked.to(losses)}
        if cache.groups is not None:
            columns["dims"] = torch.full_like(log_ratio, visits.dims)
        return columns | ({"apart": distance} if check_start else {})

    def summarise(columns: Columns) -> dict[str, float]:
        log_ratio, liked = columns["log_ratio"], columns["liked"] == 1
        dims = columns.get("dims")

        def gap(rows: Tensor) -> float:
            return mean_over_dims(-log_ratio[rows], visits.dims if dims is None else dims[rows])

        sides = {"winner_error_gap": liked, "loser_error_gap": ~liked}
        return {
            "implicit_accuracy": float(implicit_accuracy(torch.where(liked, log_ratio, -log_ratio)).mean()),
            **{name: gap(rows) for name, rows in sides.items() if rows.any()},
            "baseline_logit": beta * float(baseline_of(log_ratio)),
            **quantiles("log_ratio", beta * log_ratio),
        }

    check = partial(require_equal_outputs, allowed=between_outputs(run.accelerator)) if check_start else None
    survey = Survey(visits.measure, visits.receive)
    return OfflineMethod(len(cache), micro_batch, summarise, check, survey, cache.groups)


class _Visits:
    """The noised pictures of visits, and the results of the survey of a step."""

    def __init__(self, cache: PairCache, networks: Networks, run: Run, liked_share: float, caption_dropout: float):
        self.cache, self.networks, self.run = cache, networks, run
        self.liked_share, self.caption_dropout = liked_share, caption_dropout
        self.dims = 0
        self.baseline = torch.zeros(())
        # From the survey of this step: the results of the reference on each micro-batch, so it is not called again.
        self.known: dict[tuple[Sample, ...], tuple[Tensor, Tensor]] = {}

    def noised(self, samples: list[Sample]) -> tuple[Noised, Tensor]:
        """The pictures of these visits, noised, and which are liked [b]."""
        seed, device = self.run.seed, self.run.accelerator.device
        latents, text, told = pick(self.cache, samples, self.networks, seed)
        liked = liked_of(samples, self.liked_share, seed)
        side = torch.arange(len(samples)), (~liked).long()
        shown = latents[side].to(device)
        text = drop_captions(text.to(device), self.cache.empty_text, samples, self.caption_dropout, seed)
        self.dims = shown[0].numel()
        told = None if told is None else told[side][:, None]
        return noised_lists(shown[:, None], text, samples, self.networks, seed, told=told), liked.to(device)

    def policy(self, noised: Noised) -> Tensor:
        with self.run.accelerator.autocast():
            return self.networks.policy(noised.x, noised.t, noised.text)

    def reference(self, samples: list[Sample], noised: Noised, policy: Tensor) -> tuple[Tensor, Tensor]:
        """The reference's errors [b], and how far its outputs are from the policy's; from the survey if it ran."""
        known = self.known.pop(tuple(samples), None)
        if known is not None:
            return known
        assert self.networks.reference is not None  # KTO needs one
        with torch.no_grad(), self.run.accelerator.autocast():
            output = self.networks.reference(noised.x, noised.t, noised.text)
        return _errors(output, noised), apart(policy, output, 1)

    def measure(self, samples: list[Sample]) -> Columns:
        noised, _ = self.noised(samples)
        output = self.policy(noised)
        found = self.reference(samples, noised, output)
        self.known[tuple(samples)] = found
        return {"log_ratio": found[0] - _errors(output, noised)}

    def receive(self, columns: Columns) -> None:
        self.baseline = baseline_of(columns["log_ratio"])


def _errors(output: Tensor, noised: Noised) -> Tensor:
    """Squared errors [b], summed over dims."""
    return sum_dims((widen(output) - widen(noised.target)).square())
