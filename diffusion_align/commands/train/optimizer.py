"""AdamW and its learning rate, as the options ask for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffusion_align.commands.train.course import warmup_of
from diffusion_align.options import TrainCommon
from diffusion_align.train.optimizer import adamw, lr_schedule, redraw_rate


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
    """Go on by the course over all `steps`, where `was` had been planned; what that does to the rate, in a line."""
    before, after = redraw_rate(scheduler)
    return (
        f"extended from {was} to {steps} steps: the {o.lr_scheduler} rate follows its course over {steps}; "
        f"after step {step} it is {after:.4g}, where the course over {was} had {before:.4g}"
    )
