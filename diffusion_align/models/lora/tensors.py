"""The tensors of a LoRA file: are shapes and values sound, and what are the rank and alpha of each layer?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_align.system.printable import printable

from .kinds import kind_of
from .settings import Settings
from .updates import Layer

Keys = Mapping[str, str]
_RANK_OF = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "a2")  # tensors whose first axis is the rank


class Incomplete(ValueError):
    """The file does not fit the model in full; `fact` says so without a cure."""

    def __init__(self, fact: str):
        super().__init__(f"{fact}; load_lora(..., allow_partial=True) leaves them out")
        self.fact = fact


class UnknownAlpha(ValueError):
    """Nothing tells the strength of the file; `fact` says so without a cure."""

    def __init__(self, fact: str):
        super().__init__(f"{fact}, or give load_lora(..., alpha=...)")
        self.fact = fact


@dataclass
class Source:
    """The file that is read, whether it may be read in part, notes on repairs, and the alpha if the reader knows it."""

    path: Path
    allow_partial: bool = False
    notes: list[str] = field(default_factory=list)
    alpha: float | None = None

    def leave_out(self, keys: Iterable[str], problem: str) -> None:
        """Raise Incomplete because of these keys or, if the file may be read in part, note that they are left out."""
        if not (keys := sorted(keys)):
            return
        fault = f"{len(keys)} {problem}, the first is {shown(keys[0])}"
        if not self.allow_partial:
            raise Incomplete(f"{self.path}: {fault}")
        self.notes.append(f"left out: {fault}")


def shown(key: str) -> str:
    return printable(key)[:200]


def read_layer(source: Source, keys: Keys, tensors: Mapping[str, Tensor], scale: float, module: nn.Module) -> Layer:
    """One layer in float32.

    Raises:
        ValueError: it does not fit the module, or has values that are not finite; the message names a key.
    """
    kind = kind_of(keys)
    assert kind is not None  # checked when the names were read
    parts = {}
    for part, key in keys.items():
        if part == "alpha":
            continue
        tensor = tensors[key]
        if not tensor.dtype.is_floating_point and part != "on_input":
            raise ValueError(f"{source.path}: {printable(key)} holds {short(tensor)}, not floating-point numbers")
        parts[part] = tensor.float()
        if not bool(parts[part].isfinite().all()):
            raise ValueError(f"{source.path}: {printable(key)} has values that are not finite")
    layer = Layer(kind, parts, scale, dict(keys))
    try:
        layer.weight(torch.zeros(module.get_parameter("weight").shape))
        layer.bias(None if module.bias is None else torch.zeros(module.get_parameter("bias").shape))
    except (RuntimeError, ValueError, AttributeError) as error:
        first, shape = min(keys.values()), list(module.get_parameter("weight").shape)
        reason = " ".join(str(error).split())[:150]
        raise ValueError(
            f"{source.path}: {printable(first)} and the {layer.title} tensors beside it do not fit the layer's "
            f"weight, which is {shape} ({reason})"
        ) from None
    return layer


def require_sound_halves(
    source: Source, keys: Keys, tensors: dict[str, Tensor], module: nn.Module, rank: int | None
) -> None:
    """Raise ValueError, naming the key, unless the halves of a plain LoRA have the layer's shape and one rank (the
    header's, if it gives one). Halves of a linear layer may be stored as 1x1 convolutions, and the other way round."""
    weight = module.get_parameter("weight")
    inner = list(weight.shape[1:])
    for part in ("down", "up"):
        tensor = tensors[keys[part]]
        if 1 < weight.ndim != tensor.ndim in (2, 4) and all(size == 1 for size in tensor.shape[2:]):
            tensors[keys[part]] = tensor = tensor.reshape(*tensor.shape[:2], *[1] * (weight.ndim - 2))
            note = "halves stored as convolutions of 1x1 pixels reshaped, such as "
            if not any(line.startswith(note) for line in source.notes):
                source.notes.append(note + printable(keys[part]))
    for part in ("down", "up"):
        tensor, key = tensors[keys[part]], printable(keys[part])
        down = tensors[keys["down"]]
        its_rank = rank if rank is not None else (down.shape[0] if down.ndim else 0)
        due = [its_rank, *inner] if part == "down" else [weight.shape[0], its_rank, *[1] * (weight.ndim - 2)]
        if list(tensor.shape) != due or its_rank < 1:
            raise ValueError(f"{source.path}: {key} is {list(tensor.shape)}, not {due}, as rank {its_rank} needs")


def scales_of(
    source: Source, layers: Mapping[str, Keys], tensors: Mapping[str, Tensor], settings: Settings | None
) -> dict[str, float]:
    """The strength of each layer, alpha / rank: alpha from the header, else from the file's own tensors, else from the
    reader, else the rank (strength 1). For OFT it is its alpha."""
    scaled = {layer: keys for layer, keys in layers.items() if kind_of(keys) in ("LoRA", "LoHa", "LoKr", "GLoRA")}
    with_one = {layer: keys["alpha"] for layer, keys in scaled.items() if "alpha" in keys}
    found = {layer: _number(source, key, tensors[key]) for layer, key in with_one.items()}
    if settings is not None:
        other = [key for layer, key in with_one.items() if found[layer] != settings.alpha(layer)]
        if other:
            alpha = settings.alpha(next(layer for layer in with_one if with_one[layer] == other[0]))
            raise ValueError(f"{source.path}: its header gives alpha {alpha:g}, and {printable(other[0])} another")
        found = {layer: settings.alpha(layer) for layer in scaled}
    without = [layer for layer in scaled if layer not in found]
    if found and without:
        raise ValueError(
            f"{source.path}: {len(without)} layers have no alpha and others have one, the first is {min(without)}.alpha"
        )
    if without and source.alpha is not None:
        found = dict.fromkeys(scaled, source.alpha)
    elif without:
        _require_alpha_of_peft(source, scaled)
        first = min(without)
        source.notes.append(f"alpha is missing, so taken to be the rank (scale 1), the first missing is {first}.alpha")
    scales = {}
    for layer, keys in layers.items():
        rank = settings.rank(layer) if settings is not None else _rank(keys, tensors)
        scales[layer] = found[layer] / rank if layer in found and rank else 1.0
        if kind_of(keys) == "OFT":
            scales[layer] = float(tensors[keys["alpha"]]) if "alpha" in keys else 0.0
    return scales


def _require_alpha_of_peft(source: Source, layers: Mapping[str, Keys]) -> None:
    """peft keeps alpha in adapter_config.json only, so without that file the strength cannot be known."""
    key = next((key for keys in layers.values() for key in keys.values() if key.startswith("base_model.model.")), None)
    if key is not None or source.path.name == "adapter_model.safetensors":
        example = f" ({printable(key)})" if key else ""
        raise UnknownAlpha(
            f"{source.path}: alpha is unknown, as this file of peft{example} has no adapter_config.json beside it: put "
            "that file there"
        )


def _rank(keys: Keys, tensors: Mapping[str, Tensor]) -> int:
    """The rank of a layer; 0 for LoKr in full matrices, which no alpha scales."""
    part = next((part for part in _RANK_OF if part in keys), None)
    return tensors[keys[part]].shape[0] if part is not None and tensors[keys[part]].ndim else 0


def _number(source: Source, key: str, tensor: Tensor) -> float:
    if tensor.numel() == 1 and bool(tensor.float().isfinite().all()) and float(tensor) != 0:
        return float(tensor)
    raise ValueError(
        f"{source.path}: {printable(key)} is {tensor.flatten()[:4].tolist()}, where one number other than 0 is needed"
    )


def short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
