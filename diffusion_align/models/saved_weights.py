"""Saves and loads trained weights in diffusers' formats, completely or not at all.

diffusers and peft skip what a file lacks, or fill it at random, and only warn.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

from ..system.file_modes import readable
from ..system.plain_json import read_json
from .lora.adapters import add_lora, require_no_lora
from .lora.files import METADATA, read_lora
from .lora.tensors import Source
from .pipeline import TextToImage

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
_LENGTH = 8  # bytes before the header of a safetensors file, which say how long it is
logger = logging.getLogger(__name__)


def save_lora(unet: UNet2DConditionModel, folder: str | os.PathLike[str]) -> Path:
    """Write `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` loads without more arguments.

    Rank, alpha and targets go into the file's header, as diffusers would otherwise take the rank for alpha.
    """
    config = unet.peft_config["default"]  # type: ignore[index]
    metadata = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    with _staged(Path(folder) / LORA_FILE) as partial:
        StableDiffusionPipeline.save_lora_weights(
            partial, unet_lora_layers=dict(_lora_state(unet)), unet_lora_adapter_metadata=metadata
        )
        sort_header(partial / LORA_FILE)
        os.replace(partial / LORA_FILE, Path(folder) / LORA_FILE)
    return Path(folder) / LORA_FILE


def sort_header(path: Path) -> None:
    """Sort the metadata of a safetensors file, whose order differs from process to process, so that equal weights make
    equal files.

    `__metadata__` keeps its length, so nothing else moves. The file is replaced completely or not at all.
    """
    data = path.read_bytes()
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    header = json.loads(data[_LENGTH:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # safetensors aligns tensors to eight bytes with spaces after the JSON.
    text += b" " * (-len(text) % _LENGTH)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(len(text).to_bytes(_LENGTH, "little") + text + data[end:])
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write in, so that an older file stays until the new one is complete."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # from an attempt that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_lora(model: TextToImage, folder: str | os.PathLike[str], *, allow_partial: bool = False) -> None:
    """Add the LoRA of a run folder, or of a file in the names of diffusers, peft or kohya, to the model's network,
    completely or not at all.

    One warning lists repairs (names, half precision, a missing alpha, strengths that differ between layers). With
    `allow_partial` the file may hold more or less than this network's layers, for instance text encoders'; the warning
    then lists what was left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key, which the message names, is missing, unknown, of another shape or not finite; or the network
            has a LoRA already.
    """
    path = _lora_file(Path(folder))
    tensors, header = read_tensors(path)
    require_no_lora(model.unet)
    source = Source(path, allow_partial)
    lora = read_lora(source, tensors, header | _peft_header(path), model.unet)
    add_lora(model.unet, lora.rank, lora.alpha, list(lora.pairs))
    with torch.no_grad():
        for key, parameter in _lora_state(model.unet).items():
            layer, half = key.removesuffix(".weight").rsplit(".lora.", 1)
            parameter.copy_(lora.pairs[layer][half == "up"])
    if source.notes:
        logger.warning("%s: %s", path, "; ".join(source.notes))


def _lora_file(place: Path) -> Path:
    """The file itself, or the one in a run folder or in a folder that peft wrote."""
    if not place.exists():
        raise FileNotFoundError(f"{place} is not there: give the folder of a finished LoRA run, or a LoRA's file")
    found = [place / name for name in (LORA_FILE, PEFT_FILE) if (place / name).is_file()]
    if place.is_dir() and not found:
        raise FileNotFoundError(f"{place / LORA_FILE} is not there: give the folder of a finished LoRA run")
    return found[0] if found else place


def _peft_header(path: Path) -> dict[str, str]:
    """peft's adapter_config.json in the form of diffusers' header."""
    file = path.parent / "adapter_config.json"
    if path.name != PEFT_FILE or not file.is_file():
        return {}
    config = read_json(file)
    return {METADATA: json.dumps({f"unet.{key}": value for key, value in config.items()})}


def _lora_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The LoRA's own tensors (not copies) under diffusers' names, for every kind of layer.

    diffusers' own converter renames only attention layers, and a file of mixed names reloads incompletely.
    """
    state = get_peft_model_state_dict(unet)
    return {
        key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): value for key, value in state.items()
    }


def save_unet(unet: UNet2DConditionModel, folder: str | os.PathLike[str]) -> Path:
    """Write all weights to `folder/unet`, for `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")`."""
    path = Path(folder) / "unet"
    with _staged(path) as partial:
        unet.save_pretrained(partial / "new")
        for file in (partial / "new").iterdir():
            readable(file)
        if path.exists():
            os.replace(path, partial / "old")
        os.replace(partial / "new", path)
    return path


def load_unet(model: TextToImage, folder: str | os.PathLike[str]) -> None:
    """Replace the network's weights by those in `folder/unet`, completely or not at all, in the model's precision.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a key, which the message names, is missing, unknown, of another shape or not finite; or the files
            are of another network.
    """
    path = Path(folder) / "unet"
    files = sorted(path.glob("diffusion_pytorch_model*.safetensors"))
    if not files or not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is not there: give the folder of a finished run with full fine-tuning")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    for key in ("in_channels", "out_channels", "cross_attention_dim", "attention_head_dim"):
        if config.get(key) != model.unet.config[key]:
            raise ValueError(f"{path}: {key} is {config.get(key)}, the base model has {model.unet.config[key]}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)[0]
    wanted = model.unet.state_dict()
    require_same_tensors(path, wanted, tensors)
    model.unet.load_state_dict(tensors)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its header. Raises ValueError if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): copy it again") from error


def require_same_tensors(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming file and key, unless `found` has the names and shapes of `wanted` and finite values."""
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"{path}: {len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"{path}: the network has no layer for {len(extra)} tensors, the first is {extra[0]}")
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise ValueError(f"{path}: {key} is {list(found[key].shape)}, the network wants {list(tensor.shape)}")
        if not bool(found[key].isfinite().all()):
            raise ValueError(f"{path}: {key} has values that are not finite")
