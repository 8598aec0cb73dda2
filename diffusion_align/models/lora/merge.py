"""Merges adapters of any kind into the weights of a model, completely or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn

from .files import UNET, Adapter
from .opening import adapter_digest, networks_of, open_adapter
from .tensors import Source, shown
from .updates import Layer

if TYPE_CHECKING:
    from ..pipeline import TextToImage

logger = logging.getLogger(__name__)


def merge_lora(
    model: TextToImage,
    place: str | os.PathLike[str],
    *,
    allow_partial: bool = False,
    alpha: float | None = None,
    scale: float = 1.0,
) -> list[str]:
    """Merge an adapter of any kind into the weights of UNet and text encoders; returns its kinds in words.

    `scale` multiplies the change of every weight: 1 is the adapter as it was trained, 0.5 half of it.

    The model's fingerprint changes, so that caches and runs of other weights are not mistaken for this model's.
    One warning lists repairs, as `load_lora` does.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `open_adapter`.
    """
    adapter, source = open_adapter(model, place, allow_partial=allow_partial, alpha=alpha)
    merge_layers(model, adapter, source, adapter.layers, scale)
    model.merged = (*model.merged, adapter_digest(place) + ("" if scale == 1 else f" x {scale:g}"))
    if source.notes:
        logger.warning("%s: %s", source.path, "; ".join(source.notes))
    return adapter.kinds()


@torch.no_grad()
def merge_layers(
    model: TextToImage, adapter: Adapter, source: Source, networks: Collection[str], scale: float = 1.0
) -> None:
    """Merge the layers of some networks, with `scale` times their change.

    Raises:
        ValueError: a new weight is not finite; the message names a key, and the model is unchanged.
    """
    modules = networks_of(model)
    chosen = [
        (layer, modules[network].get_submodule(name))
        for network in networks
        for name, layer in adapter.layers[network].items()
    ]
    for layer, module in chosen:
        if not bool(_new_weight(layer, module).isfinite().all()):
            raise ValueError(
                f"{source.path}: {shown(min(layer.keys.values()))} gives weights that are not finite; "
                "the file is damaged, or made for another model"
            )
    for layer, module in chosen:
        weight = module.get_parameter("weight")
        bias = None if module.bias is None else module.get_parameter("bias").float().cpu()
        new, moved = _new_weight(layer, module), layer.bias(bias)
        weight.copy_(_part_of(weight, new, scale))
        if moved is not None:
            module.get_parameter("bias").copy_(_part_of(module.get_parameter("bias"), moved, scale))
    if any(network != UNET for network in networks):
        model.forget_texts()


def _part_of(old: torch.Tensor, new: torch.Tensor, scale: float) -> torch.Tensor:
    if scale == 1:
        return new
    before = old.float().cpu()
    return before + scale * (new - before)


def _new_weight(layer: Layer, module: nn.Module) -> torch.Tensor:
    """Computed on the CPU, where float32 is float32 on every machine."""
    return layer.weight(module.get_parameter("weight").float().cpu())
