"""The length of an offline run, and its beta in every unit, to check before it starts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_align.methods.entry import About, Length
from diffusion_align.objectives import beta_per_squared_error
from diffusion_align.options import TrainOffline, TrainSpm, UsageError
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
    """How many processes the launcher started, known before they communicate."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation_of(o: TrainOffline | TrainSpm, processes: int) -> int:
    """Micro-batches of a step on each device, from gradient_accumulation_steps or effective_batch_size.

    Raises:
        UsageError: an effective batch that does not divide into equal micro-batches, or contradicts the other options.
    """
    batch, at_once = o.effective_batch_size, o.train_batch_size * processes
    if batch is None:
        return o.gradient_accumulation_steps or 1
    product = f"train_batch_size {o.train_batch_size} x {processes} {'process' if processes == 1 else 'processes'}"
    if batch % at_once:
        low, high = batch // at_once * at_once, -(-batch // at_once) * at_once
        near = f"{low} or {high}" if low else f"{high}"
        raise UsageError(
            f"effective_batch_size {batch} is no multiple of {product} = {at_once}: take {near}, "
            "or another train_batch_size"
        )
    if o.gradient_accumulation_steps not in (None, batch // at_once):
        raise UsageError(
            f"effective_batch_size {batch} over {product} means gradient_accumulation_steps {batch // at_once}, not "
            f"{o.gradient_accumulation_steps}: leave one of the two out"
        )
    return batch // at_once


def steps_of(
    per_device: int, processes: int, accumulation: int, epochs: int, max_steps: int | None, pairs: int | None
) -> Steps:
    """The number of steps: `max_steps`, or enough for `epochs` passes over the pairs."""
    batch = per_device * processes * accumulation
    steps = max_steps if max_steps is not None else None if pairs is None else math.ceil(epochs * pairs / batch)
    return Steps(per_device, processes, accumulation, steps, pairs)


def path_weight(schedule: Schedule) -> float:
    """T times the mean of omega: the sum over t of (SNR_{t-1} / SNR_t - 1) / 2, about 6.53 for Stable Diffusion.

    The exact weights of the path's KL vary with t (Wallace et al. 2023, eq. 14, before omega is made constant). A
    constant weight replaces them by their mean; their sum converts a beta per squared error into one per nat.
    """
    lam = schedule.half_log_snr(torch.arange(schedule.num_timesteps, dtype=torch.float64))
    lam = lam[torch.isfinite(lam)]
    return float((torch.expm1(2 * (lam[:-1] - lam[1:])) / 2).sum())


def describe_steps(plan: Steps) -> list[str]:
    devices = "device" if plan.processes == 1 else "devices"
    batch = f"{plan.per_device} per device x {plan.processes} {devices} x {plan.accumulation} accumulation"
    lines = [f"effective batch  {batch} = {plan.batch} pairs"]
    if plan.pairs and plan.batch > plan.pairs:
        lines.append(
            f"                 each of the {plan.pairs} pairs occurs {plan.batch / plan.pairs:.3g} times within one "
            "step, with other noise each time: use more pairs or a smaller batch"
        )
    if plan.steps is None:
        return [*lines, "steps            unknown until the pairs are counted"]
    samples = plan.steps * plan.batch
    epochs = f", {samples / plan.pairs:.3g} epochs of {plan.pairs} pairs" if plan.pairs else ""
    return [*lines, f"steps            {plan.steps}, {samples} samples{epochs}"]


def latent_beta(o: Any, shape: Sequence[int]) -> float:
    """`beta_dpo` per squared error summed over the latents' dims."""
    return beta_per_squared_error(o.beta_dpo, math.prod(shape), o.beta_convention)


def describe_beta(o: Any, about: About) -> list[str]:
    """beta in its own unit, per squared error summed over dims, in the other published unit, and per nat."""
    per_sum, dims, schedule = latent_beta(o, about.shape), about.dims, about.schedule
    others = {"salesforce": 2 * dims * per_sum, "diffusers": dims * per_sum}
    same = ", ".join(f"{value:g} in the unit of {name}" for name, value in others.items() if name != o.beta_convention)
    per_nat = f"; about {per_sum / path_weight(schedule):.3g} per nat of path KL" if schedule.kind == "vp" else ""
    return [
        f"latent dims D    {' x '.join(map(str, about.shape))} = {dims}",
        f"beta             {o.beta_dpo:g} in the unit of {o.beta_convention} = {same}",
        f"                 {per_sum:.4g} per squared error summed over D{per_nat}",
    ]


def length_of(o: TrainOffline | TrainSpm, about: About, counted: str) -> Length:
    """Batch and steps of an offline run; `counted`: the items, such as pairs."""
    accumulation = accumulation_of(o, about.processes)
    plan = steps_of(
        o.train_batch_size, about.processes, accumulation, o.num_train_epochs, o.max_train_steps, about.count
    )  # fmt: skip
    lines = [line.replace("pairs", counted) for line in describe_steps(plan)]
    return Length(plan.steps, plan.batch, lines, accumulation, identity={"batch": plan.batch})


def require_accumulation(o: TrainOffline | TrainSpm) -> None:
    """Raise UsageError for a batch that does not divide among the processes."""
    accumulation_of(o, processes_here())
