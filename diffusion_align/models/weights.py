"""Trained weights on disk, in diffusers' formats; read whole or not at all.

diffusers and peft leave out, or fill at random, what a file lacks, and only warn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

from .adapters import add_lora
from .pipeline import TextToImage

LORA_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # the header key under which diffusers keeps rank and alpha


def save_lora(unet: UNet2DConditionModel, folder: str | os.PathLike[str]) -> Path:
    """Write `pytorch_lora_weights.safetensors` so that `pipe.load_lora_weights(folder)` needs nothing else typed.

    Rank, alpha and targets go into the file's header: without them diffusers takes alpha for the rank on reload.
    """
    config = unet.peft_config["default"]  # type: ignore[index]
    metadata = {
        "unet.r": config.r,
        "unet.lora_alpha": config.lora_alpha,
        "unet.target_modules": sorted(config.target_modules),
    }
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=dict(_lora_state(unet)), unet_lora_adapter_metadata=_unprefixed(metadata)
    )
    return Path(folder) / LORA_FILE


def load_lora(gate: TextToImage, folder: str | os.PathLike[str]) -> None:
    """Add the LoRA of a run folder (or of a file) to the gate's network, all of it or nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing, unknown, of another shape or not finite; the message names it.
    """
    path = Path(folder) / LORA_FILE if Path(folder).is_dir() else Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: give the folder of a finished LoRA run")
    tensors, header = read_tensors(path)
    rank, alpha, targets = _lora_shape(path, header, tensors)
    add_lora(gate.unet, rank, alpha, targets)
    try:
        _fill_lora(gate.unet, path, tensors)
    except ValueError:
        gate.unet.unload_lora()  # delete_adapters would leave the layers wrapped, under other names
        raise


def _lora_shape(path: Path, header: dict[str, str], tensors: dict[str, Tensor]) -> tuple[int, float, list[str]]:
    """Rank, alpha and target layers of a file: from its header, else read off its keys (alpha is then the rank)."""
    if not tensors:
        raise ValueError(f"{path} holds no tensors: the run that wrote it did not finish")
    foreign = next((key for key in tensors if not key.startswith("unet.") or ".lora" not in key), None)
    if foreign:
        raise ValueError(
            f"{path}: key {foreign} is not a UNet LoRA in diffusers format (unet.<layer>.lora.down.weight)"
        )
    if METADATA in header:
        return _read_header(path, header[METADATA])
    down = {key: tensor for key, tensor in tensors.items() if key.endswith(("lora.down.weight", "lora_A.weight"))}
    ranks = {tensor.shape[0] for tensor in down.values()}
    if len(ranks) != 1:
        raise ValueError(f"{path}: its layers have ranks {sorted(ranks)}, and no header says what was meant")
    layers = sorted({key.removeprefix("unet.").rsplit(".lora", 1)[0] for key in tensors})
    return ranks.pop(), float(next(iter(down.values())).shape[0]), layers


def _read_header(path: Path, text: str) -> tuple[int, float, list[str]]:
    try:
        known = json.loads(text)
        rank, alpha, targets = known["unet.r"], known["unet.lora_alpha"], known["unet.target_modules"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its header {METADATA} does not tell rank, alpha and targets ({error!r})") from error
    if not isinstance(targets, list):
        raise ValueError(
            f"{path}: its header gives unet.target_modules as {targets!r}, where a list of names is needed"
        )
    # Each of these changes what the tensors mean, and a plain LoRA would load them without a word.
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out"):
        if known.get(f"unet.{key}"):
            raise ValueError(
                f"{path}: its header sets unet.{key}, which is not supported: train or convert a plain LoRA"
            )
    return int(rank), float(alpha), targets


def _fill_lora(unet: UNet2DConditionModel, path: Path, tensors: dict[str, Tensor]) -> None:
    wanted = {f"unet.{key}": parameter for key, parameter in _lora_state(unet).items()}
    require_same_tensors(path, wanted, tensors)
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])


def _lora_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The LoRA's own tensors (not copies) under diffusers' names, for every kind of layer.

    diffusers' own converter renames attention layers only; a file of mixed names reloads in part, with a warning.
    """
    state = get_peft_model_state_dict(unet)
    return {
        key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): value for key, value in state.items()
    }


def _unprefixed(metadata: dict[str, object]) -> dict[str, object]:
    return {key.removeprefix("unet."): value for key, value in metadata.items()}


def save_unet(unet: UNet2DConditionModel, folder: str | os.PathLike[str]) -> Path:
    """Write the whole network to `folder/unet`, loadable by `UNet2DConditionModel.from_pretrained(folder,
    subfolder="unet")`."""
    path = Path(folder) / "unet"
    unet.save_pretrained(path)
    return path


def load_unet(gate: TextToImage, folder: str | os.PathLike[str]) -> None:
    """Replace the gate's network's weights by those in `folder/unet`, all of them or nothing, in the gate's precision.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a key is missing, unknown, of another shape or not finite (the message names it), or the network is
            another one than the gate's.
    """
    path = Path(folder) / "unet"
    files = sorted(path.glob("diffusion_pytorch_model*.safetensors"))
    if not files or not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is not there: give the folder of a finished run with full fine-tuning")
    config = json.loads((path / "config.json").read_text())
    for key in ("in_channels", "out_channels", "cross_attention_dim", "attention_head_dim"):
        if config.get(key) != gate.unet.config[key]:
            raise ValueError(f"{path}: {key} is {config.get(key)}, the base model has {gate.unet.config[key]}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)[0]
    wanted = gate.unet.state_dict()
    require_same_tensors(path, wanted, tensors)
    gate.unet.load_state_dict(tensors)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its header. Raises ValueError if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it again") from error


def require_same_tensors(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming file and key, unless `found` has the names and shapes of `wanted` and finite values."""
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"{path}: {len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"{path}: the network has no layer for {len(extra)} tensors, the first is {extra[0]}")
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise ValueError(f"{path}: {key} is {list(found[key].shape)}, the network wants {list(tensor.shape)}")
        if not bool(found[key].isfinite().all()):
            raise ValueError(f"{path}: {key} has values that are not finite")
