"""A LoRA file of any dialect as one LoRA for a network: whole or refused, and what had to be repaired is said.

Other loaders leave out what they do not know and go on, with a warning or without one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from .lora_names import flat, kind, layer_names, of_text_encoder, read_name
from .lora_tensors import Pair, Source, alphas_of, one_rank, require_sound, shown

METADATA = "lora_adapter_metadata"  # the header key under which diffusers keeps rank and alpha


@dataclass(frozen=True)
class Lora:
    """Down- and up-projection of each layer, of one rank and one alpha, in float32."""

    rank: int
    alpha: float
    pairs: dict[str, Pair]


def read_lora(source: Source, tensors: Mapping[str, Tensor], header: Mapping[str, str], network: nn.Module) -> Lora:
    """Make one LoRA for a network out of a file's tensors.

    Raises:
        ValueError: something is missing, unknown, damaged or no plain LoRA; the message names the file and the key.
    """
    path = source.path
    if not tensors:
        raise ValueError(f"{path} holds no tensors: the run that wrote it did not finish")
    keys = _keys_by_layer(source, tensors, network)
    told = _read_header(path, header)
    keys = _whole(source, keys, network, told[2] if told else None)
    pairs = {layer: (tensors[of["down"]], tensors[of["up"]]) for layer, of in keys.items()}
    require_sound(source, keys, pairs, network, told[0] if told else None)
    alphas = alphas_of(source, keys, tensors, told[1] if told else None)
    return Lora(*one_rank(source, keys, pairs, alphas))


def _keys_by_layer(source: Source, tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, dict[str, str]]:
    """The file's keys by layer and part; those of text encoders and of layers that are not there are left out."""
    names, keys = layer_names(network), {}
    texts, strangers, dialects = [], [], {}
    for key in sorted(tensors):
        if of_text_encoder(key):
            texts.append(key)
            continue
        name = read_name(key)
        if name is None:
            raise ValueError(f"{source.path}: key {shown(key)} is no part of a plain LoRA: convert it to one")
        layer = names.get(flat(name.stem))
        if layer is None:
            strangers.append(key)
            continue
        parts = keys.setdefault(layer, {})
        if name.part in parts:
            raise ValueError(f"{source.path}: {shown(key)} and {shown(parts[name.part])} are the same layer's")
        parts[name.part] = key
        if (name.dialect, key.startswith("unet.")) != ("diffusers", True):
            dialects.setdefault(name.dialect, f"{name.dialect} names read, such as {shown(key)} for {layer}")
    source.notes += dialects.values()
    source.leave_out(texts, "tensors are for text encoders, which are not tuned here")
    if strangers and not keys:
        raise ValueError(
            f"{source.path}: none of its layers is one of this network's, the first is {shown(strangers[0])}: "
            "another kind of model's LoRA, or another program's names"
        )
    source.leave_out(strangers, "tensors are for layers that this network does not have (another model's LoRA?)")
    if not keys:
        raise ValueError(
            f"{source.path}: nothing in it is for the network that denoises, only {shown(min(tensors))} ..."
        )
    return keys


def _whole(
    source: Source, keys: dict[str, dict[str, str]], network: nn.Module, targets: list[str] | None
) -> dict[str, dict[str, str]]:
    """The layers with both halves; none may be missing that the header names or, without one, that is of a kind with
    one that is there."""
    layers = set(layer_names(network).values())
    if targets is None:
        kinds = {kind(layer) for layer in keys}
        due = {layer for layer in layers if kind(layer) in kinds}
    else:
        due = {layer for layer in layers if any(layer == name or layer.endswith("." + name) for name in targets)}
    extra = [key for layer, parts in keys.items() if layer not in due for key in parts.values()]
    source.leave_out(extra, "tensors are for layers that its header does not name")
    pairs = {layer: parts for layer, parts in keys.items() if layer in due and {"down", "up"} <= parts.keys()}
    halves = [f"lora.{part} of {layer}" for layer in keys.keys() & due for part in {"down", "up"} - keys[layer].keys()]
    source.leave_out(halves, "halves of layers are missing")
    source.leave_out([f"lora of {layer}" for layer in due - keys.keys()], f"of {len(due)} layers are missing")
    if not pairs:
        raise ValueError(f"{source.path}: not one layer in it is whole, the first is {min(keys)}")
    return pairs


def _read_header(path: Path, header: Mapping[str, str]) -> tuple[int, float, list[str]] | None:
    """Rank, alpha and targets, where diffusers or this package wrote them down."""
    if METADATA not in header:
        return None
    try:
        known = json.loads(header[METADATA])
        rank, alpha, targets = known["unet.r"], known["unet.lora_alpha"], known["unet.target_modules"]
        rank, alpha = int(rank), float(alpha)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: its header {METADATA} does not tell rank, alpha and targets ({error!r})") from error
    if not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"{path}: its header gives unet.lora_alpha as {alpha}, where a number other than 0 is needed")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(
            f"{path}: its header gives unet.target_modules as {targets!r:.90}, where a list of names is needed"
        )
    # Each of these changes what the tensors mean, and a plain LoRA would load them without a word.
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out"):
        if known.get(f"unet.{key}"):
            raise ValueError(
                f"{path}: its header sets unet.{key}, which is not supported: train or convert a plain LoRA"
            )
    return rank, alpha, targets
