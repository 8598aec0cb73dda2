"""Writes exports: a LoRA's file or folder, a UNet, and a whole model in diffusers' format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ...system.file_modes import readable
from .. import convert
from ..lora.opening import PEFT_CONFIG, PEFT_FILE, networks_of
from ..pipeline import TextToImage
from .precision import cast_network


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file; equal tensors and headers make equal files."""
    save_file(dict(tensors), path, metadata=dict(header))
    _sort_header(path)
    readable(path)


def write_peft(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write an adapter's folder, for `PeftModel.from_pretrained` and `load_adapter`."""
    folder.mkdir()
    LoraConfig(**about).save_pretrained(str(folder))
    path = folder / PEFT_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # peft writes a set, in an order of chance
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    write_tensors(folder / PEFT_FILE, tensors, {"format": "pt"})


def write_unet(folder: Path, unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Write a UNet to `folder/unet`, for `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")`."""
    cast_network(unet, dtype, "unet")
    unet.save_pretrained(folder / "unet")
    _make_readable(folder)


def write_model(path: Path, model: TextToImage, dtype: torch.dtype, *, one_file: bool, title: str) -> None:
    """Write a whole model: a folder that diffusers' pipelines load, or one file with the keys of the original code."""
    for name, network in {**networks_of(model), "vae": model.vae}.items():
        cast_network(network, dtype, name)
    convert.write_model(model, path, dtype, one_file=one_file, title=title)
    if one_file:
        _sort_header(path)


def _sort_header(path: Path) -> None:
    """Sort the metadata of a new safetensors file in place, as their order differs from process to process."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length  # the same entries in another order
        file.seek(8)
        file.write(text)


def _make_readable(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            readable(path)
