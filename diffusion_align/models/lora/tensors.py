"""The tensors of a LoRA file: are shapes and values sound, and what are the rank and alpha of each layer?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffusion_align.system.printable import printable

Pair = tuple[Tensor, Tensor]
Keys = Mapping[str, Mapping[str, str]]


@dataclass
class Source:
    """The file that is read, whether it may be read in part, and the notes on repairs."""

    path: Path
    allow_partial: bool = False
    notes: list[str] = field(default_factory=list)

    def leave_out(self, keys: Iterable[str], problem: str) -> None:
        """Raise ValueError because of these keys or, if the file may be read in part, note that they are left out."""
        if not (keys := sorted(keys)):
            return
        fault = f"{len(keys)} {problem}, the first is {shown(keys[0])}"
        if not self.allow_partial:
            raise ValueError(f"{self.path}: {fault}; load_lora(..., allow_partial=True) leaves them out")
        self.notes.append(f"left out: {fault}")


def shown(key: str) -> str:
    return printable(key)[:200]


def require_sound(source: Source, keys: Keys, pairs: Mapping[str, Pair], network: nn.Module, rank: int | None) -> None:
    """Raise ValueError, naming the key, unless each pair has the layer's shape, one rank (the header's, if it gives
    one) and finite values."""
    cast: dict[torch.dtype, str] = {}
    for layer, (down, up) in pairs.items():
        weight = network.get_parameter(f"{layer}.weight")
        for part, tensor in (("down", down), ("up", up)):
            key = printable(keys[layer][part])
            if not tensor.dtype.is_floating_point:
                raise ValueError(f"{source.path}: {key} holds {_short(tensor.dtype)}, not floating-point numbers")
            if tensor.dtype != torch.float32:
                cast.setdefault(tensor.dtype, key)
            its_rank = rank if rank is not None else (down.shape[0] if down.ndim else 0)
            inner, outer = list(weight.shape[1:]), [weight.shape[0]]
            due = [its_rank, *inner] if part == "down" else [*outer, its_rank, *[1] * (weight.ndim - 2)]
            if list(tensor.shape) != due or its_rank < 1:
                raise ValueError(f"{source.path}: {key} is {list(tensor.shape)}, not {due}, as rank {its_rank} needs")
            if not bool(tensor.float().isfinite().all()):
                raise ValueError(f"{source.path}: {key} has values that are not finite")
    source.notes += [f"{_short(dtype)} cast to float32, such as {key}" for dtype, key in cast.items()]


def alphas_of(source: Source, keys: Keys, tensors: Mapping[str, Tensor], in_header: float | None) -> dict[str, float]:
    """Alpha of each layer: from the header, else from the file's own tensors, else the rank (scale 1)."""
    with_one = {layer: parts["alpha"] for layer, parts in keys.items() if "alpha" in parts}
    found = {layer: _number(source, key, tensors[key]) for layer, key in with_one.items()}
    if in_header is not None:
        other = [key for layer, key in with_one.items() if found[layer] != in_header]
        if other:
            raise ValueError(f"{source.path}: its header gives alpha {in_header:g}, and {printable(other[0])} another")
        return dict.fromkeys(keys, in_header)
    without = [layer for layer in keys if layer not in with_one]
    if found and without:
        raise ValueError(
            f"{source.path}: {len(without)} layers have no alpha and others have one, the first is {min(without)}.alpha"
        )
    if found:
        return found
    first = min(keys)
    source.notes.append(f"alpha is missing, so taken to be the rank (scale 1), the first missing is {first}.alpha")
    return {layer: float(tensors[parts["down"]].shape[0]) for layer, parts in keys.items()}


def one_rank(
    source: Source, keys: Keys, pairs: Mapping[str, Pair], alphas: Mapping[str, float]
) -> tuple[int, float, dict[str, Pair]]:
    """(rank, alpha, pairs in float32) of the same LoRA with one rank and one alpha for all layers.

    Smaller ranks are padded with zeros; where alpha / rank differs, it is multiplied into the up-projections.
    """
    ranks = {layer: down.shape[0] for layer, (down, _) in pairs.items()}
    rank = max(ranks.values())
    small = [layer for layer in pairs if ranks[layer] < rank]
    if small:
        key = printable(keys[small[0]]["down"])
        source.notes.append(f"{len(small)} layers of smaller rank padded with zeros to {rank}, such as {key}")
    scales = {layer: alphas[layer] / ranks[layer] for layer in pairs}
    common = scales[min(scales)]
    if len(set(scales.values())) > 1:
        key = printable(keys[min(scales)]["up"])
        source.notes.append(f"strengths alpha / rank that differ between layers multiplied in, such as into {key}")
        common = 1.0
    made = {}
    for layer, (down, up) in pairs.items():
        more = rank - ranks[layer]
        up = up.float() * (scales[layer] / common) if scales[layer] != common else up.float()
        beside = [0, 0] * (up.ndim - 2)
        made[layer] = pad(down.float(), [0, 0] * (down.ndim - 1) + [0, more]), pad(up, [*beside, 0, more])
    return rank, common * rank, made


def _number(source: Source, key: str, tensor: Tensor) -> float:
    if tensor.numel() == 1 and bool(tensor.isfinite().all()) and float(tensor) != 0:
        return float(tensor)
    raise ValueError(
        f"{source.path}: {printable(key)} is {tensor.flatten()[:4].tolist()}, where one number other than 0 is needed"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
