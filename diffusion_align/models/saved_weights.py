"""Saves and loads trained weights in diffusers' formats, completely or not at all.

diffusers and peft skip what a file lacks, or fill it at random, and only warn.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from ..system.file_modes import readable
from .lora.adapters import add_lora, fill_lora
from .lora.files import UNET
from .lora.merge import merge_layers
from .lora.opening import LORA_FILE, TRAINED_ON, adapter_digest, open_adapter, read_tensors
from .lora.plain import as_lora
from .lora.start import Start, joined, lora_state
from .pipeline import TextToImage

_LENGTH = 8  # bytes before the header of a safetensors file, which say how long it is
logger = logging.getLogger(__name__)


def save_lora(unet: UNet2DConditionModel, folder: str | os.PathLike[str], *, trained_on: Sequence[str] = ()) -> Path:
    """Write `pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` loads without more arguments.

    Rank, alpha and targets go into the file's header, as diffusers would otherwise take the rank for alpha. So do the
    digests of adapters that were merged into the model that it was `trained_on`.
    """
    config = unet.peft_config["default"]  # type: ignore[index]
    metadata = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    metadata |= {"use_dora": True} if getattr(config, "use_dora", False) else {}
    with _staged(Path(folder) / LORA_FILE) as partial:
        StableDiffusionPipeline.save_lora_weights(
            partial, unet_lora_layers=dict(_lora_state(unet)), unet_lora_adapter_metadata=metadata
        )
        sort_header(partial / LORA_FILE, {TRAINED_ON: "+".join(trained_on)} if trained_on else {})
        os.replace(partial / LORA_FILE, Path(folder) / LORA_FILE)
    return Path(folder) / LORA_FILE


def save_with_start(unet: UNet2DConditionModel, start: Start, folder: str | os.PathLike[str]) -> Path:
    """Write a trained LoRA and what it started from, as far as that is not in the model's weights, in one file like
    `save_lora`'s. With mode "beneath" its rank is the sum of both ranks."""
    loras = joined(unet, start)
    given: dict[str, Any] = {f"{network}_lora_layers": state for network, state in lora_state(loras).items()}
    for network, lora in loras.items():
        about = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": sorted(lora.pairs)}
        given[f"{network}_lora_adapter_metadata"] = about | ({"use_dora": True} if lora.magnitudes else {})
    with _staged(Path(folder) / LORA_FILE) as partial:
        StableDiffusionXLPipeline.save_lora_weights(partial, **given)
        sort_header(partial / LORA_FILE)
        os.replace(partial / LORA_FILE, Path(folder) / LORA_FILE)
    return Path(folder) / LORA_FILE


def sort_header(path: Path, more: Mapping[str, str] | None = None) -> None:
    """Sort the metadata of a safetensors file, whose order differs from process to process, so that equal weights make
    equal files; and add `more` to it.

    `__metadata__` keeps its length, so nothing else moves. The file is replaced completely or not at all.
    """
    data = path.read_bytes()
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    header = json.loads(data[_LENGTH:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted((header["__metadata__"] | (more or {})).items()))
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


def load_lora(
    model: TextToImage, folder: str | os.PathLike[str], *, allow_partial: bool = False, alpha: float | None = None
) -> None:
    """Add the LoRA of a run folder, or of a file in the names of diffusers, peft or kohya, to the model's UNet,
    completely or not at all. Its layers for text encoders are merged into their weights.

    One warning lists repairs (names, half precision, a missing alpha, strengths that differ between layers). With
    `allow_partial` the file may hold more or less than this model's layers; the warning then lists what was left out.
    `alpha` is used where neither the file nor its folder gives one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key, which the message names, is missing, unknown, of another shape or not finite; it is of a kind
            that can only be merged (`merge_lora`); or the network has a LoRA already.
    """
    adapter, source = open_adapter(model, folder, allow_partial=allow_partial, alpha=alpha)
    if UNET not in adapter.layers:
        raise ValueError(f"{source.path}: it has no tensor for the UNet, only for {', '.join(adapter.layers)}")
    lora = as_lora(source, adapter.layers[UNET])
    if texts := [network for network in adapter.layers if network != UNET]:
        merge_layers(model, adapter, source, texts)
        model.merged = (*model.merged, adapter_digest(folder))
        source.notes.append(f"its layers for {' and '.join(texts)} merged into the encoder's weights")
    add_lora(model.unet, lora.rank, lora.alpha, list(lora.pairs), dora=bool(lora.magnitudes))
    fill_lora(model.unet, lora)
    if source.notes:
        logger.warning("%s: %s", source.path, "; ".join(source.notes))


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
