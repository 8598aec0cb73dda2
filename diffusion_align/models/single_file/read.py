"""Reads a model, or a VAE, from a single file: completely or not at all, with nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..components import Components
from ..prompts.conditioning import SecondEncoder
from .architecture import Architecture, architecture_of, vae_config
from .contents import Contents, NotAModel, read_contents, shown, tensor_reader
from .kinds import canonical, quantization_of
from .names import PARTS, UNET, VAE, Place, places, vae_places
from .tokenizer import tokenizers_of

# Tensors that a file may hold beside those that are read: averages, tables, losses of the VAE, marks.
IGNORED = re.compile(r"model_ema\.|first_stage_model\.loss\.|loss\.|.*position_ids$|.*logit_scale$|.*text_projection$")


def read_file(path: Path, dtype: torch.dtype, *, prediction_type: str | None = None, vae: Any = None) -> Components:
    """The model in a single file. `prediction_type` replaces the file's; `vae` takes the place of the file's.

    Raises:
        NotAModel: another kind of file, a damaged one, one without a VAE where none is given, or one that does not tell
            what its network predicts.
    """
    contents = read_contents(path)
    kind = architecture_of(contents)
    scheduler = kind.scheduler(prediction_type)
    networks = _empty_networks(kind)
    if vae is not None:
        networks.pop("vae", None)
    elif "vae" not in networks:
        raise NotAModel(f"{path} has no VAE: give one beside it", "no VAE")
    _fill(contents, networks, dtype, kind.family == "SDXL")
    tokenizers = tokenizers_of(kind)
    second = None
    if kind.text_encoder_2 is not None:
        second = SecondEncoder(networks["text_encoder_2"], tokenizers[1], zero_empty=True)
    return Components(
        unet=networks["unet"],
        vae=vae if vae is not None else networks["vae"],
        text_encoder=networks["text_encoder"],
        tokenizer=tokenizers[0],
        scheduler=scheduler,
        second=second,
    )


def _empty_networks(kind: Architecture) -> dict[str, Any]:
    """The networks without memory for their weights."""
    with init_empty_weights(include_buffers=False):
        networks: dict[str, Any] = {
            "unet": UNet2DConditionModel(**kind.unet),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**kind.text_encoder)),
        }
        if kind.vae is not None:
            networks["vae"] = AutoencoderKL(**kind.vae)
        if kind.text_encoder_2 is not None:
            networks["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**kind.text_encoder_2))
    return networks


def _fill(contents: Contents, networks: Mapping[str, nn.Module], dtype: torch.dtype, sdxl: bool) -> None:
    """Read the weights of all networks. Raises NotAModel for a tensor that is missing, spare or of another shape."""
    wanted = {name: network.state_dict() for name, network in networks.items()}
    at = places(wanted)
    raw = {canonical(key): key for key in contents.entries}
    used = {place.key for of in at.values() for place in of.values()}
    prefixes = (UNET, "cond_stage_model.", "conditioner.", *([VAE] if "vae" in networks else []))
    spare = [key for key in raw if key.startswith(prefixes) and key not in used and not IGNORED.match(key)]
    spare = [key for key in spare if not _unused_layer(key, used)]
    if spare:
        raise NotAModel(
            f"{contents.path} holds {len(spare)} tensors for layers that its family does not have, the first is "
            f"{shown(min(spare))}: a relative with another structure; use its folder in diffusers' format"
        )
    if missing := sorted(used - raw.keys()):
        raise NotAModel(
            f"{contents.path} lacks {len(missing)} tensors, the first is {shown(missing[0])}: fetch it again"
        )
    get = tensor_reader(contents.path)
    for name, network in networks.items():
        # float16 would overflow in SDXL's VAE, and rounding to it cannot be undone.
        precision = torch.float32 if name == "vae" and sdxl and dtype == torch.float16 else dtype
        fill_network(network, at[name], lambda key: get(raw[key]), precision, contents.path)


def _unused_layer(key: str, used: set[str]) -> bool:
    """Whether a tensor is of OpenCLIP's last layer, which Stable Diffusion 2.x leaves out."""
    match = re.match(r"(cond_stage_model\.model\.transformer\.resblocks\.)(\d+)\.", key)
    return match is not None and f"{match[1]}{int(match[2]) - 1}.ln_1.weight" in used


def fill_network(
    network: nn.Module, at: Mapping[str, Place], get: Callable[[str], Tensor], dtype: torch.dtype, path: Path
) -> None:
    """Read the weights of one network, which has none yet. Raises NotAModel for a tensor of another shape."""
    state = {}
    for key, tensor in network.state_dict().items():
        place = at[key]
        found = get(place.key)
        found = found.T if place.transposed else found
        if place.part is not None:
            rows = found.shape[0] // len(PARTS)
            found = found[place.part * rows : (place.part + 1) * rows]
        if found.shape != tensor.shape and found.ndim == 4 and tensor.ndim == 2:
            found = found[..., 0, 0]  # a 1x1 convolution
        if found.shape != tensor.shape:
            raise NotAModel(f"{path}: {shown(place.key)} is {list(found.shape)}, where {list(tensor.shape)} is needed")
        state[key] = found.to(dtype, copy=True).contiguous()
    network.load_state_dict(state, assign=True)
    network.eval()


def read_vae(path: Path, dtype: torch.dtype, *, family: str, resolution: int) -> AutoencoderKL:
    """A VAE from a file with nothing else, under the original names or diffusers', or from a whole model's file.

    Raises:
        NotAModel: the file holds no VAE.
    """
    contents = read_contents(path)
    if quantized := quantization_of(contents.entries):
        raise NotAModel(f"{path} is quantized ({quantized}): use the VAE's fp16, bf16 or fp32 file", "quantized")
    entries = contents.entries
    prefix = VAE if any(key.startswith(VAE) for key in entries) else ""
    theirs = "encoder.down_blocks.0.resnets.0.conv1.weight" in entries
    if not theirs and f"{prefix}encoder.down.0.block.0.conv1.weight" not in entries:
        raise NotAModel(f"{path} holds no VAE of Stable Diffusion (no encoder.down): give a VAE's file or folder")
    if theirs:
        back = {place.key: key for key, place in vae_places(entries, "").items()}
        entries = {original: entries[key] for original, key in back.items()}
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKL(**vae_config(entries, prefix, family, resolution))
    get, at = tensor_reader(path), vae_places(vae.state_dict(), prefix)
    if missing := sorted({place.key for place in at.values()} - entries.keys()):
        raise NotAModel(f"{path} lacks {len(missing)} tensors of the VAE, the first is {shown(missing[0])}")
    read = (lambda key: get(back[key])) if theirs else get
    fill_network(vae, at, read, dtype, path)
    return vae
