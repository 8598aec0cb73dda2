"""Before the first update the margin is 0 and the ratio 1: checks of that, within what rounding explains.

A kernel rounds in another order when the batch has another shape, or when gradients are on. The difference is relative
to the network's output and grows with the unit roundoff of its arithmetic. Measured between autocast and float32, in
units of 2^-8 (bfloat16) and 2^-11 (float16): 1.1 and 1.0 on the embedded model, 3.2 and 3.3 on a UNet with Stable
Diffusion's blocks at half width; between batch shapes in float32, in units of 2^-24: 6 and 16. The limit is 8 units,
and 1024 in float32, where Winograd convolutions lose more.
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
    """The differences that rounding explains. prediction: of a guided prediction, relative (see `path_gradient`); step,
    run: of a log-ratio between equal models, in nats summed over dims, at one step and over a trajectory. name: the
    precision.
    """

    prediction: float
    step: float
    run: float
    name: str


def arithmetic(accelerator: Accelerator) -> str:
    """The precision in which the network computes: a key of `ROUNDING`."""
    if accelerator.mixed_precision != "no":
        return accelerator.mixed_precision
    kind = accelerator.device.type
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return "tf32" if kind == "cuda" and tf32 else "no"


def between_outputs(accelerator: Accelerator) -> float:
    """The largest relative difference between two outputs of one network: 0 in float32 on a CPU, where kernels are the
    same with and without gradients."""
    name = arithmetic(accelerator)
    return 0.0 if name == "no" and accelerator.device.type == "cpu" else ROUNDING[name]


def along_runs(name: str, table: StepTable, dims: int, guidance: float, prediction_type: str) -> Allowed:
    """The limits for trajectories of a sampler whose network computes in `name`, a key of `ROUNDING`.

    Guidance g adds g and 1 - g times the independent rounding errors of its two outputs: a factor of hypot(g, g - 1).
    The error of an output moves the mean of a step by delta standard deviations per dim. The log-ratio of two Gaussians
    at that distance is delta^2 D / 2 nats, with a standard deviation of delta sqrt(D), of which six are allowed.
    Outputs are assumed to be of size 1 per dim.
    """
    relative = ROUNDING[name] * math.hypot(guidance, guidance - 1)
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    # The factor from an error of the output to one of the clean prediction: see prediction.py.
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
    """The relative difference [b] of the outputs [K b,...] of two networks, the largest over the K pictures of
    a row. The order is that of `Noised`."""
    difference, size = (sum_dims(x.to(torch.float32).square()) for x in (policy - reference, reference))
    relative = torch.where(difference > 0, difference / size, difference).sqrt()
    return relative.view(entries, -1).amax(0)


def require_equal_outputs(columns: Columns, *, allowed: float) -> None:
    """Raise RuntimeError if policy and reference, which are equal at the start, are further `apart` than `allowed`."""
    # Values that are not finite are ignored here: the step is then skipped.
    largest = float(torch.where(columns["apart"].isfinite(), columns["apart"], 0).max())
    if largest > allowed:
        raise RuntimeError(
            "before the first update the policy already differs from its reference: their outputs are "
            f"{largest:.1e} apart, relative, and rounding explains {allowed:.1e}. Usual causes: dropout in the model "
            "(make it 0 in unet/config.json); weights that only the policy has (start from a model without them); "
            "kernels that round more (leave out xformers, or train in float32)"
        )


def require_equal_ratios(columns: Columns, *, dims: int, allowed: Allowed) -> None:
    """Raise RuntimeError if the policy differs from what drew the trajectories, or from its reference, before the first
    update.

    Both importance ratios must be 1 up to the rounding that is `allowed`, as kernels may differ with gradients on.
    """

    def largest(values: Tensor) -> float:
        # Values that are not finite are ignored here: the step is then skipped.
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
