"""Before the first update margin is 0 and ratio 1: checks of that, and how much of a difference rounding explains.

A kernel rounds in another order when the batch has another shape, or when gradients are on. The difference is relative
to the network's output and grows with the unit roundoff of its arithmetic. Measured between autocast and float32, in
units of 2^-8 (bfloat16) and 2^-11 (float16): 1.1 and 1.0 on the embedded model, 3.2 and 3.3 on a UNet with Stable
Diffusion's blocks at half width; between batch shapes in float32, in units of 2^-24: 6 and 16. Allowed are 8 units, and
1024 in float32, where convolutions by Winograd's algorithm lose more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_align.samplers import StepTable
from diffusion_align.tensors import sum_dims
from diffusion_align.train.method import Columns

if TYPE_CHECKING:
    from accelerate import Accelerator

FLOAT32 = 1024 * 2.0**-24
ROUNDING = {"bf16": 8 * 2.0**-8, "fp16": 8 * 2.0**-11, "tf32": 8 * 2.0**-11, "no": FLOAT32}
NAMES = {"bf16": "bfloat16", "fp16": "float16", "tf32": "TF32", "no": "float32"}


@dataclass(frozen=True)
class Allowed:
    """What rounding explains. prediction: of a guided prediction, relative (see `path_gradient`); step, run: of a
    log-ratio between equal models, in nats summed over dims, at one step and summed over a run. name: the arithmetic.
    """

    prediction: float
    step: float
    run: float
    name: str


def arithmetic(accelerator: Accelerator) -> str:
    """What the network computes in: a key of `ROUNDING`."""
    if accelerator.mixed_precision != "no":
        return accelerator.mixed_precision
    kind = accelerator.device.type
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return "tf32" if kind == "cuda" and tf32 else "no"


def between_outputs(accelerator: Accelerator) -> float:
    """The relative difference that two outputs of one network may have: 0 in float32 on a CPU, where the kernels are
    the same with and without gradients."""
    name = arithmetic(accelerator)
    return 0.0 if name == "no" and accelerator.device.type == "cpu" else ROUNDING[name]


def along_runs(name: str, table: StepTable, dims: int, guidance: float, prediction_type: str) -> Allowed:
    """What rounding explains along runs of a sampler whose network computes in `name`, a key of `ROUNDING`.

    Guidance g adds g and 1 - g times the rounding of its two outputs, which are independent: a factor of
    hypot(g, g - 1). An output's error moves the mean of a step by `gain` times as many standard deviations, delta a
    dim. The log-ratio of two Gaussians that far apart is delta^2 D / 2 nats, give or take delta sqrt(D): six times that
    is allowed. Outputs are taken to be of size 1 a dim.
    """
    relative = ROUNDING[name] * math.hypot(guidance, guidance - 1)
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    # How much an error of the output weighs in the clean prediction: see prediction.py.
    weight = {"epsilon": sigma / alpha, "sample": torch.ones_like(sigma)}.get(prediction_type, sigma)
    nats = []
    for k in range(len(table)):
        if table.stochastic[k]:
            moved = sum(abs(float(table.c[k, j] * weight[k - j])) for j in range(int(table.order[k])))
            delta = relative * moved / float(table.std[k])
            nats.append(delta**2 * dims / 2 + 6 * delta * math.sqrt(dims))
    return Allowed(relative, max(nats, default=0.0), sum(nats), NAMES[name])


@torch.no_grad()
def apart(policy: Tensor, reference: Tensor, entries: int) -> Tensor:
    """How far the outputs [K b,...] of two networks on lists of K are apart, [b]: the largest relative difference of a
    list's entries, whose rows are in the order of `Noised`."""
    difference, size = (sum_dims(x.to(torch.float32).square()) for x in (policy - reference, reference))
    relative = torch.where(difference > 0, difference / size, difference).sqrt()
    return relative.view(entries, -1).amax(0)


def require_equal_outputs(columns: Columns, *, allowed: float) -> None:
    """Stop a fresh run whose policy is further `apart` from its reference than rounding explains: both are one function
    then, so more is a difference that nobody meant."""
    # A number that is not finite is the business of the step, which is then skipped.
    largest = float(torch.where(columns["apart"].isfinite(), columns["apart"], 0).max())
    if largest > allowed:
        raise RuntimeError(
            "before the first update the policy already differs from its reference: their outputs are "
            f"{largest:.1e} apart, relative, and rounding explains {allowed:.1e}. Usual causes: dropout in the model "
            "(make it 0 in unet/config.json); weights that only the policy has (start from a model without them); "
            "kernels that round more (leave out xformers, or train in float32)"
        )


def require_equal_ratios(columns: Columns, *, dims: int, allowed: Allowed) -> None:
    """Stop a fresh run whose policy is not what drew the runs, or not its reference, before the first update.

    Both ratios are those of a function to itself: 1 up to the rounding that is `allowed` where kernels differ with
    gradients on. Raises RuntimeError, which says how much that is.
    """

    def largest(values: Tensor) -> float:
        # A number that is not finite is the business of the step, which is then skipped.
        return float(torch.where(values.isfinite(), values, 0).abs().max())

    drift = largest(columns.get("drift", torch.zeros(1)))
    if drift > allowed.step:
        raise RuntimeError(
            "before the first update the importance ratio is not 1: a step's log-ratio to the policy that drew it is "
            f"{drift:.3g} nats over {dims} dims, and rounding in {allowed.name} explains {allowed.step:.3g}. Usual "
            "causes: dropout or something else random in the model; weights that changed after drawing"
        )
    apart = max(largest(v) for name, v in columns.items() if name.startswith("log_ratio"))
    if apart > allowed.run:
        raise RuntimeError(
            f"before the first update the policy already differs from its reference: |log-ratio| is {apart:.3g} nats "
            f"over {dims} dims, not 0, and rounding in {allowed.name} explains {allowed.run:.3g}. Usual causes: "
            "dropout is active; they run in different precision; the policy was loaded with weights that the reference "
            "lacks"
        )
