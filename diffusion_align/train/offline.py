"""Diffusion-DPO's loop over cached pairs (Wallace et al. 2023, arXiv 2311.12908), in pieces that other losses share.

`noised_lists` and `denoising_errors` work for lists of any length K, a pair being K = 2, the winner first.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from diffusion_align import rng
from diffusion_align.data.cache import PairCache
from diffusion_align.objectives import implicit_accuracy
from diffusion_align.prediction import add_noise, target
from diffusion_align.schedule import Schedule
from diffusion_align.tensors import sum_dims
from diffusion_align.train.pair_losses import PairLoss, PairOutputs, margin_of
from diffusion_align.train.record import quantiles
from diffusion_align.train.rounding import between_outputs
from diffusion_align.train.steps import Progress, Sample, StepRecord, run_steps

if TYPE_CHECKING:
    from accelerate import Accelerator

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(x [B,...], t [B], text [B,L,E]) -> the network's output [B,...]`, float32."""


class Noised(NamedTuple):
    """A batch of lists, noised, as one batch of K*B rows: all first entries, then all second ones, and so on."""

    x: Tensor
    t: Tensor
    text: Tensor
    target: Tensor
    entries: int


def noised_lists(
    latents: Tensor,
    text: Tensor,
    samples: Sequence[Sample],
    schedule: Schedule,
    prediction_type: str,
    seed: int,
    *,
    shared_noise: bool = True,
) -> Noised:
    """Noise latents [B,K,C,h,w] with one timestep and one noise per list, addressed by (epoch, index).

    Timesteps are uniform over 0..N-1. That timestep and noise are shared in the pair is the pseudo-code of
    Diffusion-DPO's paper; sharing makes the margin a difference of the pictures only. Without `shared_noise` each
    picture has its own, at (epoch, index, picture), as in RankDPO (Karthik et al. 2024, arXiv 2410.18013, eq. 5).
    """
    batch, entries = latents.shape[:2]
    addresses = list(samples)
    t = rng.integers_batch(0, schedule.num_timesteps, seed, "timestep", addresses)
    # All first entries, then all second ones: the order of the rows.
    places = addresses * entries if shared_noise else [(*a, entry) for entry in range(entries) for a in addresses]
    drawn = {place: rng.normal(latents.shape[2:], seed, "noise", *place) for place in dict.fromkeys(places)}
    noise = torch.stack([drawn[place] for place in places]).to(latents)
    alpha, sigma = (level.to(latents).repeat(entries) for level in (schedule.alpha(t), schedule.sigma(t)))
    clean = latents.transpose(0, 1).reshape(entries * batch, *latents.shape[2:])
    return Noised(
        x=add_noise(clean, noise, alpha, sigma),
        t=t.to(latents.device).repeat(entries),
        text=text.repeat(entries, *[1] * (text.ndim - 1)),
        target=target(clean, noise, alpha, sigma, prediction_type),
        entries=entries,
    )


def denoising_errors(predict: Predict, noised: Noised) -> Tensor:
    """Squared errors of one call of the network on the whole batch, summed over dims in float32 -> [B,K]."""
    output = predict(noised.x, noised.t, noised.text)
    errors = sum_dims((output.to(torch.float32) - noised.target.to(torch.float32)).square())
    return errors.view(noised.entries, -1).T


def drop_captions(text: Tensor, empty: Tensor, samples: Sequence[Sample], probability: float, seed: int) -> Tensor:
    """Replace each text [B,L,E] by the empty prompt's [1,L,E] with this probability, addressed by (epoch, index)."""
    if probability == 0:
        return text
    dropped = rng.uniform_batch(seed, "caption", list(samples)) < probability
    return torch.where(dropped.to(text.device)[:, None, None], empty.to(text), text)


def train_pairs(
    cache: PairCache,
    predict_policy: Predict,
    predict_reference: Predict | None,
    *,
    schedule: Schedule,
    prediction_type: str,
    loss: PairLoss | Callable[[PairOutputs], Tensor],
    beta: float,
    parameters: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    accelerator: "Accelerator",
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
    """Train on pairs with any loss of `pair_losses`; yields after each optimizer step.

    One policy call per micro-batch of a step, on 2b rows, winners first, and one reference call where the loss needs a
    reference. The margin (eq. 14 without beta T omega) is in units of squared error summed over dims;
    `objectives.beta_per_squared_error` converts a published beta to it. Log, average and save between the yields: the
    record's `progress` goes into the checkpoint.

    Args:
        predict_reference: None will do for a `PairLoss` whose `needs_reference` is False; it is then never called.
        loss: pairs -> loss [b], with beta already bound: `pair_losses.on_margin(partial(logistic, beta=beta))`.
        beta: the same beta, here only to report margins as logits.
        batch_size: pairs per optimizer step, over all processes and micro-batches.
        accumulation: micro-batches per process that a step is cut into.
        caption_dropout: probability of training a pair under the empty prompt (0.2 in the authors' code).
        max_grad_norm: clip the total gradient norm; None leaves it.
        progress: where to go on; None starts a fresh run.
        check_start: stop a fresh run whose policy is not its reference before the first update, up to the rounding
            of the precision; in float32 on a CPU exactly.
        weights: [len(cache)] factors on the pairs' losses, such as the strength of a preference; the mean stays one
            over pairs, so `loss` starts at log 2 times their mean. None: 1 each.

    Metrics: implicit_accuracy; winner_error_gap and loser_error_gap (policy minus reference, mean over dims);
    margin_p05, margin_p50, margin_p95 (beta times margin); grad_norm (before clipping), lr, samples, skipped. Without
    a reference the first six do not exist; winner_error and loser_error (the policy's own, mean over dims) are there.

    Raises:
        RuntimeError: policy and reference differ before the first update (see `check_start`).
        ValueError: no reference for a loss that needs one, weights that are not one finite number >= 0 a pair, or as
            `steps.run_steps`. NonFiniteError: as there.
    """
    dims: list[int] = []
    compares = getattr(loss, "needs_reference", True)  # a plain function is a loss that does
    frozen = predict_reference if compares else None
    if compares and frozen is None:
        raise ValueError("this loss compares with the frozen reference: pass predict_reference")
    of_pair = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    if of_pair is not None and (
        of_pair.shape != (len(cache),) or not bool((of_pair >= 0).all() & of_pair.isfinite().all())
    ):
        raise ValueError(f"expected {len(cache)} weights, finite and not below 0, one a pair")

    def micro_batch(samples: list[Sample], _: list[Sample]) -> dict[str, Tensor]:
        latents, text = cache.batch([index for _, index in samples])
        latents, text = latents.to(accelerator.device), text.to(accelerator.device)
        text = drop_captions(text, cache.empty_text, samples, caption_dropout, seed)
        noised = noised_lists(latents, text, samples, schedule, prediction_type, seed)
        dims[:] = [latents[0, 0].numel()]
        with accelerator.autocast():
            with torch.no_grad():
                reference = None if frozen is None else frozen(noised.x, noised.t, noised.text)
            pairs = PairOutputs(predict_policy(noised.x, noised.t, noised.text), reference, noised.target)
        losses = loss(pairs)
        if of_pair is not None:
            losses = losses * of_pair[[index for _, index in samples]].to(losses)
        errors = pairs.errors.detach()
        if reference is None:
            return {"loss": losses, "winner_error": errors[0], "loser_error": errors[1]}
        gap = errors - pairs.reference_errors
        columns = {"loss": losses, "margin": margin_of(pairs), "winner_gap": gap[0], "loser_gap": gap[1]}
        return columns | ({"apart": apart(pairs.policy, reference, 2)} if check_start else {})

    def summarise(columns: dict[str, Tensor]) -> dict[str, float]:
        if frozen is None:
            return {name: float(columns[name].mean() / dims[0]) for name in ("winner_error", "loser_error")}
        return {
            "implicit_accuracy": float(implicit_accuracy(columns["margin"]).mean()),
            "winner_error_gap": float(columns["winner_gap"].mean() / dims[0]),
            "loser_error_gap": float(columns["loser_gap"].mean() / dims[0]),
            **quantiles("margin", beta * columns["margin"]),
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
        check_first=partial(require_start, allowed=between_outputs(accelerator)) if check_start and frozen else None,
    )


@torch.no_grad()
def apart(policy: Tensor, reference: Tensor, entries: int) -> Tensor:
    """How far the outputs [K b,...] of two networks on lists of K are apart, [b]: the largest relative difference of a
    list's entries, whose rows are in the order of `Noised`."""
    difference, size = (sum_dims(x.to(torch.float32).square()) for x in (policy - reference, reference))
    relative = torch.where(difference > 0, difference / size, difference).sqrt()
    return relative.view(entries, -1).amax(0)


def require_start(columns: dict[str, Tensor], *, allowed: float) -> None:
    """Stop a fresh run whose policy is further `apart` from its reference than rounding explains: both are one function
    then, so more is a difference that nobody meant."""
    # A number that is not finite is the business of the step, which is then skipped.
    largest = float(torch.where(columns["apart"].isfinite(), columns["apart"], 0).max())
    if largest > allowed:
        raise RuntimeError(
            "before the first update the policy already differs from its reference: their outputs are "
            f"{largest:.1e} apart, relative, and rounding explains {allowed:.1e}. Usual causes: dropout in the model "
            "(make it 0 in unet/config.json); weights that only the policy has (start from a model without them); "
            "kernels that round more (leave out xformers, or give --mixed_precision no)"
        )
