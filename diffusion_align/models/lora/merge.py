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
    model: TextToImage, place: str | os.PathLike[str], *, allow_partial: bool = False, alpha: float | None = None
) -> list[str]:
    """Merge an adapter of any kind into the weights of UNet and text encoders; returns its kinds in words.

    The model's fingerprint changes, so that caches and runs of other weights are not mistaken for this model's.
    One warning lists repairs, as `load_lora` does.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `open_adapter`.
    """
    adapter, source = open_adapter(model, place, allow_partial=allow_partial, alpha=alpha)
    merge_layers(model, adapter, source, adapter.layers)
    model.merged = (*model.merged, adapter_digest(place))
    if source.notes:
        logger.warning("%s: %s", source.path, "; ".join(source.notes))
    return adapter.kinds()


@torch.no_grad()
def merge_layers(model: TextToImage, adapter: Adapter, source: Source, networks: Collection[str]) -> None:
    """Merge the layers of some networks.

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
        weight.copy_(new)
        if moved is not None:
            module.get_parameter("bias").copy_(moved)
    if any(network != UNET for network in networks):
        model.forget_texts()


def _new_weight(layer: Layer, module: nn.Module) -> torch.Tensor:
    """Computed on the CPU, where float32 is float32 on every machine."""
    return layer.weight(module.get_parameter("weight").float().cpu())
