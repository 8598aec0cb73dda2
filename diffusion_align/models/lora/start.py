"""Training that starts from a trained LoRA: merged into the model, continued, or frozen beneath a new one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import pad

from .adapters import TRAINED, add_start, continue_start, parameters_of
from .files import UNET
from .merge import merge_layers, merge_lora
from .opening import adapter_digest, open_adapter
from .plain import Lora, OnlyMergeable, Pair, as_lora

if TYPE_CHECKING:
    from ..pipeline import TextToImage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a training starts from. With mode "merge" all of it is in the model's weights; else `lora` is the UNet's,
    and `texts` are those of the text encoders, which are merged."""

    mode: str
    kinds: list[str]
    lora: Lora | None = None
    texts: dict[str, Lora] = field(default_factory=dict)


def apply_start(
    model: TextToImage,
    place: str | os.PathLike[str],
    mode: str,
    *,
    allow_partial: bool = False,
    alpha: float | None = None,
) -> Start:
    """Make the model what a training with this LoRA starts from, with `mode` "merge", "continue" or "beneath".

    Layers of text encoders are merged in every mode. With "continue" a copy of the UNet's LoRA is ready to be trained;
    with "beneath" `add_lora` comes next.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `open_adapter`; OnlyMergeable if the mode needs a plain LoRA and the file is of another kind.
    """
    if mode == "merge":
        return Start(mode, merge_lora(model, place, allow_partial=allow_partial, alpha=alpha))
    adapter, source = open_adapter(model, place, allow_partial=allow_partial, alpha=alpha)
    if UNET not in adapter.layers:
        raise ValueError(f"{source.path}: it has no tensor for the UNet, only for {', '.join(adapter.layers)}")
    loras = {network: as_lora(source, layers) for network, layers in adapter.layers.items()}
    if mode == "beneath" and loras[UNET].magnitudes:
        raise OnlyMergeable(
            f"{source.path}: a DoRA cannot be joined with a new LoRA in one file, only continued or merged"
        )
    texts = {network: lora for network, lora in loras.items() if network != UNET}
    if texts:
        merge_layers(model, adapter, source, texts)
        model.merged = (*model.merged, adapter_digest(place))
    add_start(model.unet, loras[UNET])
    if mode == "continue":
        continue_start(model.unet, loras[UNET])
    if source.notes:
        logger.warning("%s: %s", source.path, "; ".join(source.notes))
    return Start(mode, adapter.kinds(), loras[UNET], texts)


def joined(unet: UNet2DConditionModel, start: Start) -> dict[str, Lora]:
    """All that a training added to the base model, by network: the trained LoRA, the one beneath it, and the text
    encoders' of the one that it started from."""
    trained = _trained_lora(unet)
    assert start.lora is not None  # else all but the trained LoRA is in the model's weights
    lora = trained if start.mode == "continue" else stacked(start.lora, trained)
    return {UNET: lora, **start.texts}


def _trained_lora(unet: UNet2DConditionModel) -> Lora:
    config = unet.peft_config[TRAINED]  # type: ignore[index]
    halves: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters_of(unet, TRAINED).items():
        layer, _, inner = name.partition(".lora_")
        halves.setdefault(layer, {})[inner.partition(".")[0]] = parameter.detach().cpu()
    magnitudes = {layer: h["magnitude_vector"].flatten() for layer, h in halves.items() if "magnitude_vector" in h}
    return Lora(config.r, config.lora_alpha, {layer: (h["A"], h["B"]) for layer, h in halves.items()}, magnitudes)


def stacked(first: Lora, second: Lora) -> Lora:
    """One LoRA whose update is the sum of two: its rank is the sum of theirs, and its strength 1.

    Raises:
        ValueError: one of them is a DoRA, whose update is not of low rank.
    """
    if first.magnitudes or second.magnitudes:
        raise ValueError("a DoRA cannot be joined with another LoRA in one file")
    rank = first.rank + second.rank
    pairs = {}
    for layer in sorted(first.pairs.keys() | second.pairs.keys()):
        halves = [_scaled(lora, layer) for lora in (first, second) if layer in lora.pairs]
        down, up = torch.cat([d for d, _ in halves]), torch.cat([u for _, u in halves], 1)
        more = rank - len(down)
        pairs[layer] = pad(down, [0, 0] * (down.ndim - 1) + [0, more]), pad(up, [0, 0] * (up.ndim - 2) + [0, more])
    return Lora(rank, float(rank), pairs)


def _scaled(lora: Lora, layer: str) -> Pair:
    down, up = lora.pairs[layer]
    return down, up * (lora.alpha / lora.rank)


def lora_state(loras: Mapping[str, Lora]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each network's LoRA under diffusers' names; text encoders' as transformers named them up to 5.5,
    which every program reads."""
    state: dict[str, dict[str, Tensor]] = {}
    for network, lora in loras.items():
        names = {
            layer: layer if network == UNET or layer.startswith("text_") else f"text_model.{layer}"
            for layer in lora.pairs
        }
        word = "lora" if network == UNET else "lora_linear_layer"
        for layer, (down, up) in lora.pairs.items():
            stem = f"{names[layer]}.{word}"
            state.setdefault(network, {})[f"{stem}.down.weight"] = down.contiguous()
            state[network][f"{stem}.up.weight"] = up.contiguous()
        state[network] |= {f"{names[layer]}.lora_magnitude_vector": v for layer, v in lora.magnitudes.items()}
    return state
