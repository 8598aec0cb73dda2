"""AdamW and the course of its learning rate over a run, with a default for the warm-up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffusion_align.options import TrainCommon
from diffusion_align.train.optimizer import adamw, lr_factor, lr_schedule, redraw_rate

WARMUP, FRACTION = 500, 10  # default steps of warm-up, as in diffusers' scripts, but at most one tenth of the run
Options = TypeVar("Options", bound=TrainCommon)


def settle_warmup(o: Options, steps: int) -> Options:
    """The options with a number for the warm-up; by default 500 steps, but at most a tenth of the run.

    The number is then recorded in config.yaml. "constant" has no warm-up and is not changed.
    """
    if o.lr_warmup_steps is not None or o.lr_scheduler == "constant":
        return o
    return dataclasses.replace(o, lr_warmup_steps=min(WARMUP, steps // FRACTION))


def warmup_of(o: TrainCommon) -> int:
    """Steps of warm-up after `settle_warmup`. "constant" ignores lr_warmup_steps, as in other scripts."""
    return 0 if o.lr_scheduler == "constant" else o.lr_warmup_steps or 0


def describe_course(o: TrainCommon, steps: int | None, rate: float) -> list[str]:
    """How the learning rate rises and falls, and a warning if it never reaches `rate`, the effective one. `steps` None:
    not known yet."""
    name = o.lr_scheduler.removesuffix("_with_warmup")
    if steps is None:
        return [f"course           {name}, over a number of steps that is unknown until the data are counted"]
    o = settle_warmup(o, steps)
    warmup = warmup_of(o)
    rise = f"rises over {warmup} steps, then " if warmup else ""
    fall = "constant" if name == "constant" else f"{name} to 0 at step {steps}"
    lines = [f"course           {rise}{fall}"]
    shape = {"name": name, "warmup": warmup, "total": steps, "cycles": o.lr_num_cycles, "power": o.lr_power}
    peak = max(lr_factor(step, **shape) for step in range(steps))
    if peak < 0.9:
        lines.append(
            f"warning          the rate reaches at most {peak * rate:.3g}, {100 * peak:.3g} % of {rate:g}: the warm-up "
            f"of {warmup} steps is longer than the run of {steps}; lower --lr_warmup_steps"
        )
    return lines


def make_optimizer(
    o: TrainCommon, parameters: Sequence[Parameter], learning_rate: float, steps: int
) -> tuple[Optimizer, LambdaLR]:
    """AdamW, and the course of its learning rate over the run."""
    optimizer = adamw(
        parameters,
        learning_rate,
        betas=(o.adam_beta1, o.adam_beta2),
        weight_decay=o.adam_weight_decay,
        eps=o.adam_epsilon,
        eight_bit=o.use_8bit_adam,
    )
    warmup, name = warmup_of(o), o.lr_scheduler.removesuffix("_with_warmup")
    scheduler = lr_schedule(optimizer, name, warmup=warmup, total=steps, cycles=o.lr_num_cycles, power=o.lr_power)
    return optimizer, scheduler


def extend_rate(o: TrainCommon, scheduler: LambdaLR, was: int, steps: int, step: int) -> str:
    """Follow the course over `steps` steps instead of `was`; a line that says how the rate changes."""
    before, after = redraw_rate(scheduler)
    return (
        f"extended from {was} to {steps} steps: the {o.lr_scheduler} rate follows its course over {steps}; "
        f"after step {step} it is {after:.4g}, where the course over {was} had {before:.4g}"
    )
