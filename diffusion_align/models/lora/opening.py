"""Finds and reads a file of adapters, for the networks of a model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor, nn

from ...system.plain_json import read_json
from .adapters import require_no_lora
from .files import UNET, Adapter, read_adapter
from .names import read_name
from .settings import METADATA
from .tensors import Source

if TYPE_CHECKING:
    from ..pipeline import TextToImage

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
TRAINED_ON = "diffusion_align_trained_on"  # in the header: digests of adapters that are to be merged first
_TEXT_NETWORKS = ("text_encoder", "text_encoder_2")


def open_adapter(
    model: TextToImage, place: str | os.PathLike[str], *, allow_partial: bool = False, alpha: float | None = None
) -> tuple[Adapter, Source]:
    """The layers of a file, or of the one in a folder, and notes on what was repaired. Changes nothing.

    Args:
        allow_partial: the file may hold more or less than this model's layers; what is left out is noted.
        alpha: used where neither the file nor its folder gives one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_adapter`; or the UNet has a LoRA already.
    """
    require_no_lora(model.unet)
    return open_for(networks_of(model), place, allow_partial=allow_partial, alpha=alpha, merged=model.merged)


def open_for(
    networks: Mapping[str, nn.Module],
    place: str | os.PathLike[str],
    *,
    allow_partial: bool = False,
    alpha: float | None = None,
    merged: Collection[str] | None = None,
) -> tuple[Adapter, Source]:
    """`open_adapter` for networks by diffusers' names, which may be on the meta device. `merged`: digests of the
    adapters that are merged into them; None: it does not matter."""
    path = adapter_file(Path(place))
    tensors, header = read_tensors(path)
    due = set(header.get(TRAINED_ON, "").split("+")) - {""}
    if missing := sorted(due - set(merged)) if merged is not None else []:
        raise ValueError(
            f"{path} was trained on a model with another LoRA merged into it (digest {missing[0]}), which this model "
            "lacks: merge that one first; a run keeps it in its folder starting_lora"
        )
    source = Source(path, allow_partial, alpha=alpha)
    return read_adapter(source, tensors, header | _peft_header(path), networks), source


def networks_of(model: TextToImage) -> dict[str, nn.Module]:
    """The networks of a model that an adapter may change, by diffusers' names."""
    found: dict[str, nn.Module] = {UNET: model.unet, "text_encoder": model.text_encoder}
    return found | ({"text_encoder_2": model.second.text_encoder} if model.second is not None else {})


def adapter_file(place: Path) -> Path:
    """The file itself, or the one in a run folder or in a folder that peft wrote.

    Raises:
        FileNotFoundError: there is none.
    """
    if not place.exists():
        raise FileNotFoundError(f"{place} is not there: give the folder of a finished LoRA run, or a LoRA's file")
    found = [place / name for name in (LORA_FILE, PEFT_FILE) if (place / name).is_file()]
    if place.is_dir() and not found:
        raise FileNotFoundError(f"{place / LORA_FILE} is not there: give the folder of a finished LoRA run")
    return found[0] if found else place


def adapter_files(place: str | os.PathLike[str]) -> list[Path]:
    """All files that an adapter consists of: its tensors and, for a folder of peft, their settings."""
    path = adapter_file(Path(place))
    config = path.parent / PEFT_CONFIG
    return [path, config] if path.name == PEFT_FILE and config.is_file() else [path]


def adapter_digest(place: str | os.PathLike[str]) -> str:
    """A digest of what `adapter_files` contain."""
    digest = hashlib.blake2b(digest_size=8)
    for path in adapter_files(place):
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def holds_adapter(path: Path) -> bool:
    """Whether a file is of adapters, and not a whole model, by the names of its tensors."""
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except Exception:  # the reader of safetensors raises errors of its own, and of the system
        return False
    return any(read_name(key) is not None or key.endswith(".on_input") for key in keys)


def _peft_header(path: Path) -> dict[str, str]:
    """peft's adapter_config.json in the form of diffusers' header: peft does not say of which network it is."""
    file = path.parent / PEFT_CONFIG
    if path.name != PEFT_FILE or not file.is_file():
        return {}
    config = read_json(file)
    networks = (UNET, *_TEXT_NETWORKS)
    return {METADATA: json.dumps({f"{network}.{key}": value for network in networks for key, value in config.items()})}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its header. Raises ValueError if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): copy it again") from error
