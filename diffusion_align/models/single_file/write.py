"""Writes a whole model into one file with the key names of the original code, as ComfyUI and A1111 read them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion_align.system.file_modes import readable

from .names import OPEN_CLIP, is_linear, places

States = Mapping[str, Mapping[str, Tensor]]
ARCHITECTURES = {  # of modelspec, by family and prediction type
    ("SD 1.x", "epsilon"): "stable-diffusion-v1",
    ("SD 1.x", "v_prediction"): "stable-diffusion-v1",
    ("SD 2.x", "epsilon"): "stable-diffusion-v2-512",
    ("SD 2.x", "v_prediction"): "stable-diffusion-v2-768-v",
    ("SDXL", "epsilon"): "stable-diffusion-xl-v1-base",
    ("SDXL", "v_prediction"): "stable-diffusion-xl-v1-base",
}


def family_of(states: States) -> str:
    """ "SD 1.x", "SD 2.x" or "SDXL": by the components and the UNet's projections."""
    if "text_encoder_2" in states:
        return "SDXL"
    return "SD 2.x" if is_linear(states["unet"]) else "SD 1.x"


def to_original(states: States) -> dict[str, Tensor]:
    """The tensors of a single-file checkpoint, of the state dicts of `unet`, `vae`, `text_encoder` and, for SDXL,
    `text_encoder_2`, under diffusers' and transformers' names. A LoRA must be merged before.

    Only queries, keys and values of OpenCLIP, which the format fuses, are copies.

    Raises:
        ValueError: a key of another architecture, or with a LoRA.
    """
    written: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for component, at in places(states).items():
        for key, place in at.items():
            tensor = states[component][key]
            if place.part is not None:
                fused.setdefault(place.key, {})[place.part] = tensor
                continue
            if component == "vae" and ".attn_1." in place.key and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]  # 1x1 convolutions in the original
            written[place.key] = tensor.T.contiguous() if place.transposed else tensor
    for key, parts in fused.items():
        written[key] = torch.cat([parts[i] for i in range(3)])
    return written | _unused_layer(written) if family_of(states) == "SD 2.x" else written


def _unused_layer(written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's last layer and projection, which Stable Diffusion 2.x does not use and diffusers does not keep.

    Readers of the format expect them. The layer is a copy of the one before, the projection the identity.
    """
    blocks = OPEN_CLIP + "transformer.resblocks."
    numbers = [int(match[1]) for key in written if (match := re.match(re.escape(blocks) + r"(\d+)\.", key))]
    last, width = max(numbers), written[OPEN_CLIP + "ln_final.weight"].shape[0]
    old, new = f"{blocks}{last}.", f"{blocks}{last + 1}."
    copies = {new + key.removeprefix(old): tensor for key, tensor in written.items() if key.startswith(old)}
    like = written[OPEN_CLIP + "ln_final.weight"]
    return copies | {OPEN_CLIP + "text_projection": torch.eye(width, dtype=like.dtype, device=like.device)}


def modelspec(family: str, prediction_type: str, resolution: int, title: str) -> dict[str, str]:
    """Metadata after the ModelSpec that model sites show, with what is known and nothing else."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[family, prediction_type],
        "modelspec.implementation": "sgm" if family == "SDXL" else "ldm",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[prediction_type],
    }


def save_single_file(
    path: str | os.PathLike[str],
    states: States,
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    v_prediction: bool = False,
    zero_terminal_snr: bool = False,
) -> Path:
    """Write a checkpoint, completely or not at all. Programs read the marks `v_pred` and `ztsnr` from the keys."""
    tensors = {key: tensor.to("cpu", dtype, copy=True).contiguous() for key, tensor in to_original(states).items()}
    tensors |= {"v_pred": torch.zeros(1)} if v_prediction else {}
    tensors |= {"ztsnr": torch.zeros(1)} if zero_terminal_snr else {}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        save_file(tensors, partial, {"format": "pt", **metadata})
        readable(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target
