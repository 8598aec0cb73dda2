"""AdamW and learning-rate schedules."""

import importlib
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from diffusion_align.vocabulary import LR_SCHEDULES


def adamw(
    parameters: Sequence[Parameter],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    eps: float = 1e-8,
    eight_bit: bool = False,
) -> torch.optim.Optimizer:
    """AdamW; with `eight_bit` the one of bitsandbytes, whose moments take a quarter of the memory (CUDA only)."""
    if not eight_bit:
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
    try:
        made = importlib.import_module("bitsandbytes").optim.AdamW8bit
    except ImportError as error:
        raise ImportError(
            "8-bit AdamW needs bitsandbytes: pip install 'diffusion_align[8bit]', or leave the 8-bit option out"
        ) from error
    return made(parameters, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)


def lr_factor(step: int, *, name: str, warmup: int, total: int, cycles: int = 1, power: float = 1.0) -> float:
    """The factor of the learning rate in the step that follows `step` finished ones.

    It rises linearly over `warmup` steps and then falls to 0 at step `total`: linear, half a cosine, `cycles` half
    cosines one after the other, or a power of the linear factor; "constant" stays at 1.
    """
    if step < warmup:
        return step / warmup
    if name == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if name == "linear":
        return 1.0 - done
    if name == "polynomial":
        return (1.0 - done) ** power
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 0.0 if done == 1.0 else 0.5 * (1.0 + math.cos(math.pi * (cycles * done % 1.0)))


def redraw_rate(scheduler: LambdaLR) -> tuple[float, float]:
    """Set the rate of the next step to the value of this scheduler; (before, after) of the first parameter group.

    A restored optimizer has the rate of the schedule that it was saved with, which may have been shorter.
    """
    groups = scheduler.optimizer.param_groups
    before = float(groups[0]["lr"])
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    return before, float(rates[0])


def lr_schedule(
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    warmup: int = 0,
    total: int,
    cycles: int = 1,
    power: float = 1.0,
) -> LambdaLR:
    """One of LR_SCHEDULES on this optimizer, counted in optimizer steps (of the whole run, not of one process)."""
    if name not in LR_SCHEDULES:
        raise ValueError(f"unknown learning-rate schedule {name!r}: expected one of {', '.join(LR_SCHEDULES)}")
    if warmup < 0 or total < 1 or cycles < 1 or power <= 0:
        raise ValueError(
            f"warmup {warmup}, total {total}, cycles {cycles}, power {power}: counts and power must be positive"
        )
    return LambdaLR(optimizer, partial(lr_factor, name=name, warmup=warmup, total=total, cycles=cycles, power=power))
