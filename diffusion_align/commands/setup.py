"""The parts of a run that every method builds alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffusion_align.commands.course import WARMUP, warmup_of
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


def optimizer_identity(o: TrainCommon, *, learning_rate: float, steps: int) -> dict[str, Any]:
    """What a resumed run must share with the saved one, whatever its method. `learning_rate` is the effective one."""
    same = """mode rank network_alpha lora_targets seed lr_scheduler lr_warmup_steps adam_beta1 adam_beta2
        adam_weight_decay adam_epsilon max_grad_norm skip_spikes use_8bit_adam use_ema ema_decay mixed_precision
        allow_tf32""".split()
    identity: dict[str, Any] = {"learning_rate": learning_rate, **{name: getattr(o, name) for name in same}}
    if o.lr_warmup_steps is None:
        identity["lr_warmup_steps"] = WARMUP  # of a constant rate, which has none: what older checkpoints say
    # A course that ends somewhere depends on where; a constant rate can be trained on for as long as one likes.
    return identity if o.lr_scheduler.startswith("constant") else identity | {"steps": steps}
