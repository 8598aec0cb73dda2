"""The networks of a base model without their weights, and the merge of trained weights into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..hub import read_index
from ..lora.files import UNET, Adapter
from ..lora.opening import read_tensors
from ..saved_weights import require_same_tensors
from ..single_file.architecture import architecture_of
from ..single_file.contents import read_contents


def empty_networks(place: Path) -> dict[str, nn.Module]:
    """UNet and text encoders of a model's folder or file on the meta device: names and shapes, no memory."""
    configs = _text_configs(place)
    networks: dict[str, nn.Module] = {UNET: empty_unet(place)}
    with torch.device("meta"):
        for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            if name in configs:
                networks[name] = kind(configs[name])
    return networks


def empty_unet(place: Path) -> UNet2DConditionModel:
    """The UNet of a model's folder or file on the meta device."""
    is_file = place.is_file()
    config = architecture_of(read_contents(place)).unet if is_file else UNet2DConditionModel.load_config(place / UNET)
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)  # type: ignore[return-value]


def _text_configs(place: Path) -> dict[str, CLIPTextConfig]:
    if not place.is_file():
        index = read_index(place)
        return {name: CLIPTextConfig.from_pretrained(place / name) for name in index if name.startswith("text_encoder")}
    kind = architecture_of(read_contents(place))
    configs = {"text_encoder": kind.text_encoder, "text_encoder_2": kind.text_encoder_2}
    return {name: CLIPTextConfig(**config) for name, config in configs.items() if config is not None}


def read_unet(place: Path) -> dict[str, Tensor]:
    """The tensors in the folder of a UNet."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(place.glob("diffusion_pytorch_model*.safetensors")):
        tensors |= read_tensors(file)[0]
    return tensors


def fill_unet(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor], place: Path) -> None:
    """Give a network the tensors that were read at `place`.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or not finite.
    """
    require_same_tensors(place, unet.state_dict(), tensors)
    unet.load_state_dict(tensors, assign=unet.device.type == "meta")


@torch.no_grad()
def merge_exactly(networks: Mapping[str, nn.Module], adapter: Adapter, place: Path) -> None:
    """Change the weights as an adapter does: computed in float64 and rounded once, so that the result does not depend
    on the order in which a machine sums.

    Raises:
        ValueError: a new weight is not finite.
    """
    for network, layers in adapter.layers.items():
        for name, layer in layers.items():
            module: Any = networks[network].get_submodule(name)
            exact = replace(layer, parts={part: tensor.double() for part, tensor in layer.parts.items()})
            module.weight.copy_(exact.weight(module.weight.double()))
            if not bool(module.weight.isfinite().all()):
                raise ValueError(f"{place} gives {network}'s layer {name} weights that are not finite")
            if module.bias is not None:
                module.bias.copy_(exact.bias(module.bias.double()))
