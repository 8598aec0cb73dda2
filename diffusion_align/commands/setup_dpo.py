"""The parts of a Diffusion-DPO run, each built from what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffusion_align.objectives import hinge, ipo, logistic, robust
from diffusion_align.options import TrainDpo
from diffusion_align.train.optimizer import adamw, lr_schedule


def precision(mixed_precision: str) -> str:
    """What accelerate runs in: fp16, asked for by most launchers, would need loss scaling, so bf16 stands in for it."""
    return "no" if mixed_precision == "no" else "bf16"


def make_loss(loss_type: str, beta: float, label_smoothing: float) -> Callable[[Tensor], Tensor]:
    """The objective on a margin of squared errors summed over dims, beta bound."""
    return {
        "sigmoid": partial(logistic, beta=beta, label_smoothing=label_smoothing),
        "robust": partial(robust, beta=beta, flip=label_smoothing),
        "hinge": partial(hinge, beta=beta),
        # (beta margin - 1/2)^2: the same minimum as ipo's own, but free of the margin's unit, so that a learning rate
        # and a clip mean what they mean for the others. On errors summed over dims ipo's own scale is D^2.
        "ipo": lambda margin: beta**2 * ipo(margin, beta),
    }[loss_type]


def make_optimizer(
    o: TrainDpo, parameters: Sequence[Parameter], learning_rate: float, steps: int
) -> tuple[Optimizer, LRScheduler]:
    """AdamW, and the course of its learning rate over the run."""
    optimizer = adamw(
        parameters,
        learning_rate,
        betas=(o.adam_beta1, o.adam_beta2),
        weight_decay=o.adam_weight_decay,
        eps=o.adam_epsilon,
        eight_bit=o.use_8bit_adam,
    )
    # In the scripts that people know, "constant" has no warm-up whatever --lr_warmup_steps says.
    warmup = 0 if o.lr_scheduler == "constant" else o.lr_warmup_steps
    name = o.lr_scheduler.removesuffix("_with_warmup")
    scheduler = lr_schedule(optimizer, name, warmup=warmup, total=steps, cycles=o.lr_num_cycles, power=o.lr_power)
    return optimizer, scheduler


def identity_of(
    o: TrainDpo, data_and_model: dict[str, Any], *, beta: float, batch: int, learning_rate: float, steps: int
) -> dict[str, Any]:
    """What a resumed run must share with the saved one. How a batch is cut into pieces and processes may change."""
    same = """mode rank network_alpha lora_targets loss_type label_smoothing seed lr_scheduler lr_warmup_steps
        adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm use_8bit_adam use_ema ema_decay
        proportion_empty_prompts""".split()
    identity = {
        **data_and_model,
        "beta": beta,
        "batch": batch,
        "learning_rate": learning_rate,
        "mixed_precision": precision(o.mixed_precision),
        **{name: getattr(o, name) for name in same},
    }
    # A course that ends somewhere depends on where; a constant rate can be trained on for as long as one likes.
    return identity if o.lr_scheduler.startswith("constant") else identity | {"steps": steps}
