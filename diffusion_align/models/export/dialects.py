"""A LoRA under the names that other programs read.

    diffusers  unet.down_blocks.0...to_q.lora.down.weight            rank, alpha and targets in the header
    peft       base_model.model.down_blocks.0...to_q.lora_A.weight   rank, alpha and targets in adapter_config.json
    kohya      lora_unet_down_blocks_0_..._to_q.lora_down.weight     alpha beside each layer
    original   lora_unet_input_blocks_1_1_..._to_q.lora_down.weight  the same, on the names of the first release's code

kohya's scripts have a network of diffusers' names for Stable Diffusion 1.x and 2.x, and of the original names for SDXL.
Text encoders are `text_encoder` and `text_encoder_2` in diffusers' files, and in kohya's `lora_te` or, for SDXL,
`lora_te1` and `lora_te2`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.vocabulary import LORA_TARGETS

from ..lora.files import METADATA, UNET, Lora
from ..lora.names import kind, original_names

Loras = Mapping[str, Lora]  # by network
Networks = Mapping[str, nn.Module]
# The modules on whose layers kohya's own trainer puts a LoRA.
_KOHYA_BLOCKS = ("attentions", "resnets", "downsamplers", "upsamplers")


def diffusers_file(loras: Loras, networks: Networks) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header, as `save_lora` writes them."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for network, lora in loras.items():
        about |= {f"{network}.{key}": value for key, value in _config(lora, networks[network]).items()}
        stem = _text_model(network)
        tensors |= _named(
            lora, lambda layer, stem=stem, name=network: f"{name}.{stem(layer)}", ("lora.down", "lora.up")
        )
    return tensors, {"format": "pt", METADATA: json.dumps(about, indent=2, sort_keys=True)}


def peft_files(lora: Lora, network: nn.Module, base: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the fields of `LoraConfig`, for one network."""
    about = _config(lora, network) | {"base_model_name_or_path": base, "inference_mode": True}
    return _named(lora, lambda layer: f"base_model.model.{layer}", ("lora_A", "lora_B")), about


def kohya_tensors(loras: Loras, networks: Networks, *, original: bool) -> dict[str, Tensor]:
    """Tensors with alpha, which stays float32 so that no precision rounds it.

    Args:
        original: name the UNet's layers as the first release's code does; else as diffusers does.
    """
    tensors: dict[str, Tensor] = {}
    for network, lora in loras.items():
        if network == UNET:
            names = original_names(networks[UNET]) if original else {layer: layer for layer in lora.pairs}
        else:
            names = {layer: _text_model(network)(layer) for layer in lora.pairs}
        prefix = _kohya_prefix(network, several="text_encoder_2" in networks)
        stems = {layer: f"{prefix}_{names[layer].replace('.', '_')}" for layer in lora.pairs}
        tensors |= _named(lora, stems.__getitem__, ("lora_down", "lora_up"))
        tensors |= {f"{stem}.alpha": torch.tensor(float(lora.alpha)) for stem in stems.values()}
    return tensors


def outside_kohya(layers: Collection[str]) -> list[str]:
    """Layers of the UNet that kohya's own trainer would leave out when it loads the file."""
    return sorted(layer for layer in layers if not any(f".{block}." in layer for block in _KOHYA_BLOCKS))


def target_modules(layers: Collection[str], network: nn.Module) -> list[str]:
    """The shortest known list of names whose layers of the network are exactly `layers`."""
    everything = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    kinds = {kind(layer) for layer in layers}
    for names in (*LORA_TARGETS.values(), sorted(kinds)):
        ends = tuple("." + name for name in names)
        if {layer for layer in everything if f".{layer}".endswith(ends)} == set(layers):
            return sorted(names)
    return sorted(layers)


def _config(lora: Lora, network: nn.Module) -> dict[str, Any]:
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    config = {"r": lora.rank, "lora_alpha": alpha, "target_modules": target_modules(lora.pairs, network)}
    return config | ({"use_dora": True} if lora.magnitudes else {})


def _named(lora: Lora, stem: Callable[[str], str], halves: tuple[str, str]) -> dict[str, Tensor]:
    tensors = {
        f"{stem(layer)}.{half}.weight": tensor
        for layer, pair in lora.pairs.items()
        for half, tensor in zip(halves, pair, strict=True)
    }
    magnitudes = {
        f"{stem(layer)}.lora_magnitude_vector": value.view(
            1, -1, *[1] * (lora.pairs[layer][0].ndim - 2)
        )  # peft's shapes
        if lora.pairs[layer][0].ndim > 2
        else value
        for layer, value in lora.magnitudes.items()
    }
    return tensors | magnitudes


def _text_model(network: str) -> Callable[[str], str]:
    """The names of a network's layers in files. Text encoders' are below `text_model`, where transformers had them up
    to 5.5."""
    if network == UNET:
        return lambda layer: layer
    return lambda layer: layer if layer == "text_projection" else "text_model." + layer.removeprefix("text_model.")


def _kohya_prefix(network: str, *, several: bool) -> str:
    if network == UNET:
        return "lora_unet"
    return {"text_encoder": "lora_te1" if several else "lora_te", "text_encoder_2": "lora_te2"}[network]
