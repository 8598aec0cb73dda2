"""What a run would do, in numbers a person can check before it starts. Imports torch, never diffusers."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from diffusion_align.commands.model_facts import ModelFacts
from diffusion_align.objectives import beta_per_squared_error
from diffusion_align.options import TrainCommon, TrainOffline, UsageError
from diffusion_align.schedule import Schedule


@dataclass(frozen=True)
class Steps:
    """How long a run is; `epochs` and `pairs` are None while the number of pairs is unknown."""

    per_device: int
    processes: int
    accumulation: int
    steps: int | None
    pairs: int | None

    @property
    def batch(self) -> int:
        """Pairs in one optimizer step, over all devices: what a published batch size means."""
        return self.per_device * self.processes * self.accumulation


def processes_here() -> int:
    """How many processes the launcher started; known before any of them is joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation_of(o: TrainOffline, processes: int) -> int:
    """Micro-batches that each device sums into one step: what was asked for, or what the effective batch leaves.

    Raises:
        UsageError: an effective batch that the devices cannot share equally, or that contradicts what else was set.
    """
    whole, cut = o.effective_batch_size, o.train_batch_size * processes
    if whole is None:
        return o.gradient_accumulation_steps or 1
    at_once = f"train_batch_size {o.train_batch_size} x {processes} {'process' if processes == 1 else 'processes'}"
    if whole % cut:
        low, high = whole // cut * cut, -(-whole // cut) * cut
        near = f"{low} or {high}" if low else f"{high}"
        raise UsageError(
            f"effective_batch_size {whole} is no multiple of {at_once} = {cut}: take {near}, "
            "or another train_batch_size"
        )
    if o.gradient_accumulation_steps not in (None, whole // cut):
        raise UsageError(
            f"effective_batch_size {whole} over {at_once} means gradient_accumulation_steps {whole // cut}, not "
            f"{o.gradient_accumulation_steps}: leave one of the two out"
        )
    return whole // cut


def steps_of(
    per_device: int, processes: int, accumulation: int, epochs: int, max_steps: int | None, pairs: int | None
) -> Steps:
    """The number of steps: `max_steps`, or as many as see every pair `epochs` times."""
    batch = per_device * processes * accumulation
    steps = max_steps if max_steps is not None else None if pairs is None else math.ceil(epochs * pairs / batch)
    return Steps(per_device, processes, accumulation, steps, pairs)


def path_weight(schedule: Schedule) -> float:
    """T times the mean of omega: the sum over t of (SNR_{t-1} / SNR_t - 1) / 2, about 6.53 for Stable Diffusion.

    The exact weights of the path's KL vary with t (Wallace et al. 2023, eq. 14, before omega is made constant); their
    sum is what a constant weight stands for, and turns a beta per squared error into one per nat.
    """
    lam = schedule.half_log_snr(torch.arange(schedule.num_timesteps, dtype=torch.float64))
    lam = lam[torch.isfinite(lam)]
    return float((torch.expm1(2 * (lam[:-1] - lam[1:])) / 2).sum())


def describe_trained(o: TrainCommon, facts: ModelFacts) -> str:
    """What is trained, and how many weights that is."""
    what = "the whole UNet" if o.mode == "full" else f"LoRA of rank {o.rank}, alpha {o.network_alpha or o.rank:g}"
    if not facts.unet_shapes:
        return f"{what}: number of parameters unknown"
    number = facts.full_parameters() if o.mode == "full" else facts.lora_parameters(o.rank, o.lora_targets)
    return f"{what}: {number:,} of {facts.full_parameters():,} parameters"


def describe_steps(plan: Steps) -> list[str]:
    devices = "device" if plan.processes == 1 else "devices"
    batch = f"{plan.per_device} per device x {plan.processes} {devices} x {plan.accumulation} accumulation"
    lines = [f"effective batch  {batch} = {plan.batch} pairs"]
    if plan.pairs and plan.batch > plan.pairs:
        lines.append(
            f"                 each of the {plan.pairs} pairs comes {plan.batch / plan.pairs:.3g} times within one "
            "step, with other noise each time: use more pairs or a smaller batch"
        )
    if plan.steps is None:
        return [*lines, "steps            unknown until the pairs are counted"]
    samples = plan.steps * plan.batch
    epochs = f", {samples / plan.pairs:.3g} epochs of {plan.pairs} pairs" if plan.pairs else ""
    return [*lines, f"steps            {plan.steps}, {samples} samples{epochs}"]


def describe_rate(learning_rate: float, scale: bool, batch: int) -> str:
    factor = f" = {learning_rate:g} x {batch} (scale_lr)" if scale else ""
    return f"learning rate    {learning_rate * (batch if scale else 1):g}{factor}"


def describe_beta(beta: float, convention: str, shape: tuple[int, int, int], schedule: Schedule) -> list[str]:
    """beta in the unit it was given, per squared error summed over dims, in the other published unit, and per nat."""
    dims = math.prod(shape)
    per_sum = beta_per_squared_error(beta, dims, convention)
    others = {"salesforce": 2 * dims * per_sum, "diffusers": dims * per_sum}
    same = ", ".join(f"{value:g} in the unit of {name}" for name, value in others.items() if name != convention)
    per_nat = f"; about {per_sum / path_weight(schedule):.3g} per nat of path KL" if schedule.kind == "vp" else ""
    return [
        f"latent dims D    {' x '.join(map(str, shape))} = {dims}",
        f"beta             {beta:g} in the unit of {convention} = {same}",
        f"                 {per_sum:.4g} per squared error summed over D{per_nat}",
    ]


def describe_loss(loss_type: str, label_smoothing: float) -> str:
    """Where the loss starts (margin 0) and what it can reach."""
    q = label_smoothing
    if loss_type == "sigmoid" and q:
        lowest = -q * math.log(q) - (1 - q) * math.log1p(-q)
        reach = f"starts at log 2 = 0.6931, reaches [{lowest:.4f}, inf), the least being the entropy of the smoothing"
    else:
        reach = {
            "sigmoid": "starts at log 2 = 0.6931, reaches (0, inf)",
            "hinge": "starts at 1, reaches [0, inf)",
            "ipo": "(beta margin - 1/2)^2, starts at 1/4, reaches [0, inf)",
            "robust": "starts at log 2 = 0.6931, "
            + ("has no least value: watch the margins, not the loss" if q else "reaches (0, inf)"),
            "kto": "of single pictures, starts at 1/2, reaches (0, 1)",
            "kto_pairs": "mean over winner and loser, starts at 1/2, reaches (0, 1)",
            "mapo": "the winner's error, mean over dims, and mapo_beta times a log sigmoid; no reference",
            "dspo": "the winner's error, mean over dims, against a target pushed away from the reference",
        }[loss_type]
    return f"loss             {loss_type}, {reach}"
