"""Casts tensors to the precision of an export, or says why that precision cannot hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..lora.files import Lora

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# bfloat16 rounds each number by at most 2^-8 of it. A LoRA that float16 changes more is below float16's range.
_LARGEST_ERROR = 2**-8


class PrecisionError(ValueError):
    """The precision cannot hold the tensors."""


def cast_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Contiguous tensors in `dtype`; integers stay as they are.

    Raises:
        PrecisionError: a finite value becomes infinite; the message names the tensor.
    """
    made = {}
    for name, tensor in tensors.items():
        cast = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        if not bool(cast.isfinite().all()) and bool(tensor.isfinite().all()):
            largest = float(tensor.abs().max())
            raise PrecisionError(f"{name} has the value {largest:.3g}, which {_short(dtype)} cannot hold")
        made[name] = cast
    return made


def cast_network(network: nn.Module, dtype: torch.dtype, name: str) -> None:
    """Cast a network in place. Raises PrecisionError as `cast_tensors`."""
    for key, tensor in [*network.named_parameters(), *network.named_buffers()]:
        tensor.data = cast_tensors({f"{name}: {key}": tensor.data}, dtype)[f"{name}: {key}"]


def cast_lora(lora: Lora, dtype: torch.dtype) -> Lora:
    """A LoRA in `dtype`.

    Raises:
        PrecisionError: the values are outside the range of `dtype`, or so small that most of their digits are lost.
    """
    if lora.magnitudes:
        lora = replace(lora, magnitudes=cast_tensors(lora.magnitudes, dtype))
    halves = {f"{layer} {half}": pair[half] for layer, pair in lora.pairs.items() for half in (0, 1)}
    cast = cast_tensors(halves, dtype)
    for half, what in ((0, "down"), (1, "up")):
        keys = [f"{layer} {half}" for layer in lora.pairs]
        size = sum(float(halves[key].double().square().sum()) for key in keys)
        error = sum(float((cast[key].double() - halves[key].double()).square().sum()) for key in keys)
        if error > _LARGEST_ERROR**2 * size:
            fraction = (error / size) ** 0.5
            raise PrecisionError(
                f"{_short(dtype)} would change the LoRA's {what}-projections by {fraction:.2g} of their size, because "
                "their values are too small for it"
            )
    pairs = {layer: (cast[f"{layer} 0"], cast[f"{layer} 1"]) for layer in lora.pairs}
    return replace(lora, pairs=pairs)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
