"""Reads a file of adapters in any dialect, completely or not at all; repairs are noted.

Other loaders skip what they do not know, with a warning or without one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .kinds import describe_other, kind_of, missing_parts
from .names import (
    Name,
    flat,
    flat_text,
    kind,
    layer_names,
    of_text_encoder,
    read_name,
    text_encoder_of,
    text_layer_names,
)
from .plain import Lora, as_lora
from .settings import METADATA, Settings, read_settings, require_known_type
from .tensors import Source, read_layer, require_sound_halves, scales_of, short, shown
from .updates import Layer

__all__ = ["METADATA", "Adapter", "Lora", "as_lora", "read_adapter", "read_lora"]

UNET = "unet"
Keys = dict[str, dict[str, str]]  # of each layer, by part


@dataclass(frozen=True)
class Adapter:
    """The layers of a file, by network: "unet", "text_encoder", "text_encoder_2"."""

    layers: dict[str, dict[str, Layer]]

    def kinds(self, network: str | None = None) -> list[str]:
        """The kinds of its layers in words, such as ["LoHa", "norm difference"]."""
        chosen = self.layers.values() if network is None else [self.layers.get(network, {})]
        return sorted({layer.title for layers in chosen for layer in layers.values()})


def read_lora(source: Source, tensors: Mapping[str, Tensor], header: Mapping[str, str], network: nn.Module) -> Lora:
    """One plain LoRA, or DoRA, for a UNet, from a file's tensors. Layers of text encoders are left out.

    Raises:
        ValueError: a tensor is missing, unknown, damaged or not of a LoRA; the message names file and key.
    """
    return as_lora(source, read_adapter(source, tensors, header, {UNET: network}).layers[UNET])


def read_adapter(
    source: Source, tensors: Mapping[str, Tensor], header: Mapping[str, str], networks: Mapping[str, nn.Module]
) -> Adapter:
    """All layers of a file, for the UNet and text encoders of a model.

    Raises:
        ValueError: a tensor is missing, unknown, damaged or of a kind that cannot be taken; the message names file and
            key.
    """
    if not tensors:
        raise ValueError(f"{source.path} holds no tensors: the run that wrote it did not finish")
    require_known_type(source.path, header)
    layers: dict[str, dict[str, Layer]] = {}
    for network, keys in _keys_by_network(source, tensors, networks).items():
        settings = read_settings(source.path, header, network)
        keys = _complete_layers(source, keys, network, networks[network], settings)
        if keys:
            layers[network] = _read_layers(source, keys, dict(tensors), networks[network], settings)
    if not layers:
        raise ValueError(f"{source.path}: no layer in it is complete")
    return Adapter(layers)


def _keys_by_network(
    source: Source, tensors: Mapping[str, Tensor], networks: Mapping[str, nn.Module]
) -> dict[str, Keys]:
    """The file's keys as {network: {layer: {part: key}}}; those of unknown networks and layers are left out."""
    names = {
        network: layer_names(module, norms=True) if network == UNET else text_layer_names(module)
        for network, module in networks.items()
    }
    found: dict[str, Keys] = {}
    texts, unknown, dialects = [], [], {}
    for key in sorted(tensors):
        network = (text_encoder_of(key, len(networks) - 1) or "") if of_text_encoder(key) else UNET
        if network not in networks:
            texts.append(key)
            continue
        name = _name_of(key, tensors)
        if name is None:
            raise ValueError(f"{source.path}: key {shown(key)} {describe_other(key)}")
        layer = names[network].get(flat(name.stem) if network == UNET else flat_text(name.stem))
        if layer is None:
            unknown.append(key)
            continue
        parts = found.setdefault(network, {}).setdefault(layer, {})
        if name.part in parts:
            raise ValueError(f"{source.path}: {shown(key)} and {shown(parts[name.part])} are of the same layer")
        parts[name.part] = key
        if (name.dialect, key.startswith(f"{network}.")) != ("diffusers", True):
            dialects.setdefault(name.dialect, f"{name.dialect} names read, such as {shown(key)} for {layer}")
    source.notes += dialects.values()
    why = "not tuned here" if list(networks) == [UNET] else "not of this model"
    source.leave_out(texts, f"tensors are for text encoders, which are {why}")
    if unknown and not found:
        raise ValueError(
            f"{source.path}: none of its layers is in this network, the first is {shown(unknown[0])}: "
            "a LoRA of another kind of model, or names of an unknown program"
        )
    source.leave_out(unknown, "tensors are for layers that this network does not have (another model's LoRA?)")
    if not found or (list(networks) == [UNET] and UNET not in found):
        raise ValueError(f"{source.path}: it has no tensor for the UNet, only {shown(min(tensors))} ...")
    return found


def _name_of(key: str, tensors: Collection[str]) -> Name | None:
    """The name of a key. Only beside an `on_input` a plain "weight" is a part of an adapter (IA3)."""
    stem = key.removesuffix(".weight")
    if stem != key and f"{stem}.on_input" in tensors:
        return Name(stem, "scales", "lycoris")
    return read_name(key)


def _complete_layers(source: Source, keys: Keys, network: str, module: nn.Module, settings: Settings | None) -> Keys:
    """The layers with all their parts. The file must hold every layer that its header names; without a header, every
    layer of the same kind as one that it holds."""
    for layer, parts in keys.items():
        if kind_of(parts) is None:
            words = " and ".join(shown(key) for key in sorted(parts.values())[:3])
            raise ValueError(f"{source.path}: {words} of {layer} are of no known kind of LoRA, or of several")
    modules = dict(module.named_modules())
    if settings is None:
        kinds = {kind(layer) for layer in keys}
        layers = set((layer_names(module, norms=True) if network == UNET else text_layer_names(module)).values())
        due = {layer for layer in layers if kind(layer) in kinds}
    else:
        layers = set((layer_names(module) if network == UNET else text_layer_names(module)).values())
        due = {layer for layer in layers if settings.names_layer(layer, modules[layer])}
    extra = [key for layer, parts in keys.items() if layer not in due for key in parts.values()]
    source.leave_out(extra, "tensors are for layers that its header does not name")
    gaps = {layer: missing_parts(str(kind_of(parts)), parts) for layer, parts in keys.items() if layer in due}
    if settings is not None and settings.dora:
        gaps |= {layer: [*gap, "magnitude"] for layer, gap in gaps.items() if "magnitude" not in keys[layer]}
    complete = {layer: keys[layer] for layer, gap in gaps.items() if not gap}
    of = "" if network == UNET else f"{network}."
    halves = [f"{_part_name(part)} of {of}{layer}" for layer, gap in gaps.items() for part in gap]
    source.leave_out(halves, "halves of layers are missing")
    source.leave_out([f"lora of {of}{layer}" for layer in due - keys.keys()], f"of {len(due)} layers are missing")
    if not complete and network == UNET:
        raise ValueError(f"{source.path}: no layer in it is complete, the first is {min(keys)}")
    return complete


def _part_name(part: str) -> str:
    return {"magnitude": "lora_magnitude_vector"}.get(part, f"lora.{part}" if part in ("down", "up") else part)


def _read_layers(
    source: Source, keys: Keys, tensors: dict[str, Tensor], network: nn.Module, settings: Settings | None
) -> dict[str, Layer]:
    for layer, parts in keys.items():
        found, module = str(kind_of(parts)), network.get_submodule(layer)
        if settings is not None and settings.kind != found:
            first = shown(min(parts.values()))
            raise ValueError(f"{source.path}: its header is of {settings.kind}, and {first} is of {found}")
        if found == "LoRA" and "mid" not in parts:
            require_sound_halves(source, parts, tensors, module, settings.rank(layer) if settings else None)
    scales = scales_of(source, keys, tensors, settings)
    layers = {
        layer: read_layer(source, parts, tensors, scales[layer], network.get_submodule(layer))
        for layer, parts in keys.items()
    }
    cast: dict[str, str] = {}
    for parts in keys.values():
        for part, key in parts.items():
            if part not in ("alpha", "on_input") and short(tensors[key]) != "float32":
                cast.setdefault(short(tensors[key]), key)
    source.notes += [f"{precision} cast to float32, such as {shown(key)}" for precision, key in cast.items()]
    return layers
