"""Reads a LoRA file in any dialect, completely or not at all; repairs are noted.

Other loaders skip what they do not know, with a warning or without one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from .names import flat, kind, layer_names, of_text_encoder, read_name
from .tensors import Pair, Source, alphas_of, one_rank, require_sound, shown

METADATA = "lora_adapter_metadata"  # the header key under which diffusers keeps rank and alpha


@dataclass(frozen=True)
class Lora:
    """Down- and up-projection of each layer, in float32; all layers have one rank and one alpha."""

    rank: int
    alpha: float
    pairs: dict[str, Pair]


def read_lora(source: Source, tensors: Mapping[str, Tensor], header: Mapping[str, str], network: nn.Module) -> Lora:
    """One LoRA for a network, from a file's tensors.

    Raises:
        ValueError: a tensor is missing, unknown, damaged or not of a plain LoRA; the message names file and key.
    """
    path = source.path
    if not tensors:
        raise ValueError(f"{path} holds no tensors: the run that wrote it did not finish")
    keys = _keys_by_layer(source, tensors, network)
    rank, alpha, targets = _read_header(path, header)
    keys = _complete_layers(source, keys, network, targets)
    pairs = {layer: (tensors[of["down"]], tensors[of["up"]]) for layer, of in keys.items()}
    require_sound(source, keys, pairs, network, rank)
    alphas = alphas_of(source, keys, tensors, alpha)
    return Lora(*one_rank(source, keys, pairs, alphas))


def _keys_by_layer(source: Source, tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, dict[str, str]]:
    """The file's keys as {layer: {part: key}}; those of text encoders and of unknown layers are left out."""
    names, keys = layer_names(network), {}
    texts, unknown, dialects = [], [], {}
    for key in sorted(tensors):
        if of_text_encoder(key):
            texts.append(key)
            continue
        name = read_name(key)
        if name is None:
            raise ValueError(f"{source.path}: key {shown(key)} is not of a plain LoRA: convert the file to one")
        layer = names.get(flat(name.stem))
        if layer is None:
            unknown.append(key)
            continue
        parts = keys.setdefault(layer, {})
        if name.part in parts:
            raise ValueError(f"{source.path}: {shown(key)} and {shown(parts[name.part])} are of the same layer")
        parts[name.part] = key
        if (name.dialect, key.startswith("unet.")) != ("diffusers", True):
            dialects.setdefault(name.dialect, f"{name.dialect} names read, such as {shown(key)} for {layer}")
    source.notes += dialects.values()
    source.leave_out(texts, "tensors are for text encoders, which are not tuned here")
    if unknown and not keys:
        raise ValueError(
            f"{source.path}: none of its layers is in this network, the first is {shown(unknown[0])}: "
            "a LoRA of another kind of model, or names of an unknown program"
        )
    source.leave_out(unknown, "tensors are for layers that this network does not have (another model's LoRA?)")
    if not keys:
        raise ValueError(f"{source.path}: it has no tensor for the UNet, only {shown(min(tensors))} ...")
    return keys


def _complete_layers(
    source: Source, keys: dict[str, dict[str, str]], network: nn.Module, targets: list[str] | None
) -> dict[str, dict[str, str]]:
    """The layers with both halves. The file must hold every layer that its header names; without a header, every layer
    of the same kind as one that it holds."""
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
        raise ValueError(f"{source.path}: no layer in it is complete, the first is {min(keys)}")
    return pairs


def _read_header(path: Path, header: Mapping[str, str]) -> tuple[int, float, list[str]] | tuple[None, None, None]:
    """Rank, alpha and targets, if diffusers or this package wrote them into the header."""
    if METADATA not in header:
        return None, None, None
    try:
        known = json.loads(header[METADATA])
        rank, alpha, targets = known["unet.r"], known["unet.lora_alpha"], known["unet.target_modules"]
        rank, alpha = int(rank), float(alpha)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: its header {METADATA} does not give rank, alpha and targets ({error!r})") from error
    if not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"{path}: its header gives unet.lora_alpha as {alpha}, where a number other than 0 is needed")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(
            f"{path}: its header gives unet.target_modules as {targets!r:.90}, where a list of names is needed"
        )
    # Each of these changes what the tensors mean; a loader of plain LoRAs would ignore it.
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "fan_in_fan_out"):
        if known.get(f"unet.{key}"):
            raise ValueError(
                f"{path}: its header sets unet.{key}, which is not supported: train or convert a plain LoRA"
            )
    return rank, alpha, targets
