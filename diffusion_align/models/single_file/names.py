"""Where each tensor of a diffusers pipeline is in a single-file checkpoint of the original code (LDM, sgm).

One table serves both directions: `write` puts tensors at these places, `read` takes them from there. It holds for every
size, because numbers of blocks and layers come from the keys themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST_CLIP = "cond_stage_model.transformer.text_model."  # Stable Diffusion 1.x
OPEN_CLIP = "cond_stage_model.model."  # Stable Diffusion 2.x
SDXL_CLIP = "conditioner.embedders.0.transformer.text_model."
SDXL_OPEN_CLIP = "conditioner.embedders.1.model."
PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Place:
    """A key of the original format. `part`: which third of its rows (query, key, value); None for all of them."""

    key: str
    part: int | None = None
    transposed: bool = False


_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_LAYERS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": Place("token_embedding.weight"),
    "embeddings.position_embedding.weight": Place("positional_embedding"),
    "final_layer_norm.weight": Place("ln_final.weight"),
    "final_layer_norm.bias": Place("ln_final.bias"),
    "text_projection.weight": Place("text_projection", transposed=True),
}


def places(components: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Place]]:
    """{component: {key: place}} for the keys of `unet`, `vae`, `text_encoder` and, for SDXL, `text_encoder_2`.

    Values (tensors, or anything with a `shape`) are looked at once: Stable Diffusion 2.x is told from 1.x by its linear
    projections.

    Raises:
        ValueError: a key of another architecture.
    """
    found = {"unet": unet_places(components["unet"])} if "unet" in components else {}
    if "vae" in components:
        found["vae"] = vae_places(components["vae"])
    if "text_encoder_2" in components:
        found["text_encoder"] = _each(components["text_encoder"], partial(_clip, SDXL_CLIP))
        found["text_encoder_2"] = _each(components["text_encoder_2"], partial(_open_clip, SDXL_OPEN_CLIP))
    elif "text_encoder" in components:
        second_version = is_linear(components["unet"])
        name = partial(_open_clip, OPEN_CLIP) if second_version else partial(_clip, FIRST_CLIP)
        found["text_encoder"] = _each(components["text_encoder"], name)
    return found


def is_linear(unet: Mapping[str, Any]) -> bool:
    """Whether the transformers of a UNet, by its diffusers keys, have linear projections (SD 2.x and SDXL)."""
    shapes = (value.shape for key, value in unet.items() if key.endswith(".proj_in.weight"))
    return all(len(shape) == 2 for shape in shapes)


def diffusers_end(key: str) -> str:
    """A UNet's key with its last part under diffusers' name: `...out_layers.3.weight` ends in `.conv2.weight`."""
    for theirs, ours in _RESNET.items():
        for kind in ("weight", "bias"):
            if key.endswith(f".{ours}.{kind}"):
                return f"{key.removesuffix(f'{ours}.{kind}')}{theirs}.{kind}"
    return key


def unet_places(keys: Iterable[str]) -> dict[str, Place]:
    """The places of a UNet's tensors. Raises ValueError for another architecture, or a LoRA that is not merged."""
    keys = list(keys)
    if adapted := [key for key in keys if ".base_layer." in key or ".lora_" in key]:
        raise ValueError(f"the network has a LoRA, which must be merged before: {adapted[0]}")
    layers = len({match[1] for key in keys if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", key))})
    attended = {match[1] for key in keys if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}
    return {key: Place(UNET + _unet(key, layers, attended)) for key in keys}


def _unet(key: str, layers: int, attended: set[str]) -> str:
    module, _, kind = key.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{kind}"
    match = re.fullmatch(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.([a-z]+)\.(\d+)\.(.+)", module)
    if match is None:
        raise ValueError(f"{key} has no place in a single file of Stable Diffusion")
    block, what, j, rest = match[1], match[2], int(match[3]), match[4]
    side, _, number = block.partition(".")
    place = int(number or 0) * (layers + 1) + j
    if side == "mid_block":
        at = f"middle_block.{1 if what == 'attentions' else 2 * j}"
    elif what == "downsamplers":
        return f"input_blocks.{(int(number) + 1) * (layers + 1)}.0.op.{kind}"
    elif what == "upsamplers":
        return f"output_blocks.{place + layers}.{2 if number in attended else 1}.conv.{kind}"
    else:
        inner = 1 if what == "attentions" else 0
        at = f"input_blocks.{place + 1}.{inner}" if side == "down_blocks" else f"output_blocks.{place}.{inner}"
    return f"{at}.{_RESNET.get(rest, rest) if what == 'resnets' else rest}.{kind}"


def vae_places(keys: Iterable[str], prefix: str = VAE) -> dict[str, Place]:
    """The places of a VAE's tensors; a file with nothing but a VAE has no prefix."""
    keys = list(keys)
    levels = len({match[1] for key in keys if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key))})
    return {key: Place(prefix + _vae(key, levels)) for key in keys}


def _vae(key: str, levels: int) -> str:
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|\w+samplers)\.(\d+)\.(.+)", key):
        side, way, i, what, j, rest = match.groups()
        level = int(i) if way == "down" else levels - 1 - int(i)  # the original counts from the picture's side
        inner = f"block.{j}.{_renamed(rest, _VAE_LAYERS)}" if what == "resnets" else f"{what.removesuffix('rs')}.{rest}"
        return f"{side}.{way}.{level}.{inner}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
        side, what, j, rest = match.groups()
        inner = "block_" if what == "resnets" else "attn_"
        return f"{side}.mid.{inner}{int(j) + 1}.{_renamed(rest, _VAE_LAYERS)}"
    side, _, rest = key.partition(".")
    return f"{side}.{_renamed(rest, _VAE_LAYERS)}"


def _renamed(key: str, names: Mapping[str, str]) -> str:
    module, _, kind = key.rpartition(".")
    return f"{names.get(module, module)}.{kind}" if module else kind


def _clip(prefix: str, key: str) -> Place:
    return Place(prefix + key.removeprefix("text_model."))


def _open_clip(prefix: str, key: str) -> Place:
    key = key.removeprefix("text_model.")
    if key in _OPEN_CLIP_ENDS:
        end = _OPEN_CLIP_ENDS[key]
        return Place(prefix + end.key, transposed=end.transposed)
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None:
        raise ValueError(f"{key} has no place in a single file of Stable Diffusion")
    at, module, kind = f"{prefix}transformer.resblocks.{match[1]}.", match[2], match[3]
    if fused := re.fullmatch(r"self_attn\.([qkv])_proj", module):
        return Place(f"{at}attn.in_proj_{kind}", PARTS.index(fused[1]))
    return Place(f"{at}{_OPEN_CLIP_LAYERS[module]}.{kind}")


def _each(keys: Iterable[str], place: partial[Place]) -> dict[str, Place]:
    return {key: place(key) for key in keys}
