"""The names of a LoRA file's tensors, in the dialects of the programs that write them, and the layers they belong to.

    unet.down_blocks.0...to_q.lora.down.weight                    diffusers
    unet.down_blocks.0...attn1.processor.to_q_lora.down.weight    diffusers before 0.21
    base_model.model.down_blocks.0...to_q.lora_A.weight           peft
    lora_unet_down_blocks_0_..._to_q.lora_down.weight, .alpha     kohya
    lora_unet_input_blocks_1_1_..._to_q.lora_down.weight          kohya, on the network of the first release of SDXL

Other kinds of adapters (LoHa, LoKr, ...) have the same stems with the endings of `kinds`.

A kohya name cannot be split, because its `_` may have been a dot. So no name is: the network's own layers are listed
under every name that they can have, and a file's name is looked up in that list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from .kinds import ENDINGS as OTHER_ENDINGS

_ENDINGS: tuple[tuple[str, str, str], ...] = (
    (".lora.down.weight", "down", "diffusers"),
    (".lora.up.weight", "up", "diffusers"),
    (".lora_linear_layer.down.weight", "down", "diffusers"),
    (".lora_linear_layer.up.weight", "up", "diffusers"),
    ("_lora.down.weight", "down", "old diffusers"),
    ("_lora.up.weight", "up", "old diffusers"),
    (".lora_A.weight", "down", "peft"),
    (".lora_B.weight", "up", "peft"),
    (".lora_A.default.weight", "down", "peft"),
    (".lora_B.default.weight", "up", "peft"),
    (".lora_down.weight", "down", "kohya"),
    (".lora_up.weight", "up", "kohya"),
    (".alpha", "alpha", "kohya"),
    *OTHER_ENDINGS,
)
# What programs put before a layer's name; some diffusers files put nothing there.
_PREFIX = re.compile(r"^(lora_unet_|lycoris_(unet_)?|unet\.|base_model\.model\.(unet\.)?|(model\.)?diffusion_model\.)?")
# kohya's lora_te, lora_te1, lora_te2; diffusers' text_encoder and text_encoder_2; ComfyUI's clip_l and clip_g; or
# layers without a prefix, which were below `text_model` in transformers up to 5.5.
_TEXT = re.compile(
    r"^(base_model\.model\.)?(lora_te(?P<kohya>\d?)_|text_encoder(_(?P<diffusers>\d))?\.|te(?P<short>\d?)\.|"
    r"(text_encoders\.)?clip_(?P<comfy>[lg])\.(transformer\.)?|"
    r"(?P<bare>text_model[._]|text_projection|encoder[._]layers[._]))"
)
_ENCODERS = {"": "text_encoder", "1": "text_encoder", "l": "text_encoder", "2": "text_encoder_2", "g": "text_encoder_2"}


@dataclass(frozen=True)
class Name:
    """A key of a file; `stem` is what the file calls the layer, `part` which of the layer's tensors it is."""

    stem: str
    part: str
    dialect: str


def read_name(key: str) -> Name | None:
    """Split a key of a file; None for a key of no known kind of adapter."""
    for ending, part, dialect in _ENDINGS:
        if key.endswith(ending):
            return Name(key.removesuffix(ending), part, dialect)
    return None


def of_text_encoder(key: str) -> bool:
    """Whether a key belongs to a text encoder, not to the UNet."""
    return _TEXT.match(key) is not None


def text_encoder_of(key: str, encoders: int) -> str | None:
    """ "text_encoder", "text_encoder_2" or another name of the encoder of a key; None if the key does not tell which of
    several `encoders`, or is not of one."""
    if (match := _TEXT.match(key)) is None or (match["bare"] and encoders > 1):
        return None
    number = next((match[group] for group in ("kohya", "diffusers", "short", "comfy") if match[group]), "")
    return _ENCODERS.get(number, f"text_encoder_{number}")


def flat_text(stem: str) -> str:
    """`flat` for a layer of a text encoder."""
    match = _TEXT.match(stem)
    name = stem if match is None or match["bare"] else stem[match.end() :]
    return name.removeprefix("base_model.model.").replace(".", "_").removeprefix("text_model_")


def flat(stem: str) -> str:
    """A layer's name with underscores for dots and without what differs between dialects."""
    name = _PREFIX.sub("", stem, count=1).replace(".processor.", ".").replace(".", "_")
    return name + "_0" if name.endswith("to_out") else name


def layer_names(network: nn.Module, *, norms: bool = False) -> dict[str, str]:
    """{flat name: layer} of each linear layer and convolution of a UNet, in all dialects; with `norms` also of the
    normalisations."""
    original = original_names(network, norms=norms)
    return {flat(name): layer for layer, name in original.items()} | {flat(layer): layer for layer in original}


def original_names(network: nn.Module, *, norms: bool = False) -> dict[str, str]:
    """{layer: its name in the first release's code} of the same layers."""
    layers = _layers(network, norms)
    attentions = {match[2] for layer in layers if (match := _BLOCK.fullmatch(layer)) and match[1] == "up"
                  and match[3] == "attentions"}  # fmt: skip
    numbers = [int(match[4]) for layer in layers if (match := _BLOCK.fullmatch(layer)) and match[1] == "down"]
    resnets = 1 + max(numbers, default=0)
    return {layer: _first_release(layer, resnets, attentions) for layer in layers}


def text_layer_names(network: nn.Module) -> dict[str, str]:
    """{flat name: layer} of each layer of a text encoder."""
    return {flat_text(layer): layer for layer in _layers(network, norms=True)}


def _layers(network: nn.Module, norms: bool) -> list[str]:
    classes = (nn.Linear, nn.Conv2d, *((nn.GroupNorm, nn.LayerNorm) if norms else ()))
    return [name for name, module in network.named_modules() if isinstance(module, classes)]


def kind(layer: str) -> str:
    """A layer's name within its block, such as `attn1.to_q`, whatever the block and its depth."""
    return re.split(r"(?:attentions|transformer_blocks|resnets|downsamplers|upsamplers|layers)\.\d+\.", layer)[-1]


_OUTSIDE = {  # diffusers' names, and those of CompVis and Stability's code
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def _first_release(layer: str, resnets: int, attentions: set[str]) -> str:
    """A layer's name in Stability's own code, and so in kohya's for SDXL, where all blocks are numbered in one series.

    A down block consists of its `resnets` and a downsampler; an up block has one resnet more, and the upsampler shares
    its number. `attentions` are the up blocks that have attention layers.
    """
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    if layer.startswith("mid_block."):
        _, family, number, inner = layer.split(".", 3)
        inner = _IN_RESNET.get(inner, inner) if family == "resnets" else inner
        return f"middle_block.{1 if family == 'attentions' else 2 * int(number)}.{inner}"
    match = _BLOCK.fullmatch(layer)
    if match is None:
        return layer
    way, block, family, number, inner = match.groups()
    side = "output_blocks" if way == "up" else "input_blocks"
    first = int(block) * (resnets + 1) + (way == "down")
    if family == "resnets":
        return f"{side}.{first + int(number)}.0.{_IN_RESNET.get(inner, inner)}"
    if family == "attentions":
        return f"{side}.{first + int(number)}.1.{inner}"
    if family == "downsamplers":
        return f"{side}.{first + resnets}.0.op"
    return f"{side}.{first + resnets}.{2 if block in attentions else 1}.{inner}"
