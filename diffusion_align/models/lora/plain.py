"""A plain LoRA or a DoRA of one rank and one alpha, as peft trains it, from the layers of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import pad

from diffusion_align.system.printable import printable

from .kinds import TRAINABLE
from .tensors import Source, shown
from .updates import Layer

Pair = tuple[Tensor, Tensor]


class OnlyMergeable(ValueError):
    """A file of a kind that can be merged into a model, but not trained."""


@dataclass(frozen=True)
class Lora:
    """Down- and up-projection of each layer, in float32; all layers have one rank and one alpha. `magnitudes` is empty
    or has one vector a layer (DoRA)."""

    rank: int
    alpha: float
    pairs: dict[str, Pair]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)


def as_lora(source: Source, layers: Mapping[str, Layer]) -> Lora:
    """Layers as one LoRA that can be trained. Raises OnlyMergeable for other kinds, naming the kind."""
    wrong = {name: layer for name, layer in layers.items() if layer.title not in TRAINABLE or "diff_b" in layer.parts}
    mixed = len({layer.title for layer in layers.values()}) > 1
    if wrong or mixed:
        some = min(wrong or layers)
        what = layers[some].title if wrong and layers[some].title not in TRAINABLE else "LoRA mixed with other kinds"
        raise OnlyMergeable(
            f"{source.path}: {shown(min(layers[some].keys.values()))} is of {what}, an update of the weights that can "
            "be merged into the model, but not loaded as a LoRA"
        )
    magnitudes = {name: layer.magnitude_of_outputs() for name, layer in layers.items() if layer.decomposed}
    if none := [name for name, vector in magnitudes.items() if vector is None]:
        raise OnlyMergeable(
            f"{source.path}: {shown(layers[none[0]].keys['dora_scale'])} has a magnitude for each input, which can be "
            "merged into the model, but not loaded as a LoRA"
        )
    return Lora(*one_rank(source, layers), {name: v for name, v in magnitudes.items() if v is not None})


def one_rank(source: Source, layers: Mapping[str, Layer]) -> tuple[int, float, dict[str, Pair]]:
    """(rank, alpha, pairs in float32) of the same LoRA with one rank and one alpha for all layers.

    Smaller ranks are padded with zeros; where alpha / rank differs, it is multiplied into the up-projections.
    """
    ranks = {layer: found.parts["down"].shape[0] for layer, found in layers.items()}
    rank = max(ranks.values())
    small = [layer for layer in layers if ranks[layer] < rank]
    if small:
        key = printable(layers[small[0]].keys["down"])
        source.notes.append(f"{len(small)} layers of smaller rank padded with zeros to {rank}, such as {key}")
    scales = {layer: found.scale for layer, found in layers.items()}
    common = scales[min(scales)]
    if len(set(scales.values())) > 1:
        key = printable(layers[min(scales)].keys["up"])
        source.notes.append(f"strengths alpha / rank that differ between layers multiplied in, such as into {key}")
        common = 1.0
    made = {}
    for layer, found in layers.items():
        down, up, more = found.parts["down"], found.parts["up"], rank - ranks[layer]
        up = up * (scales[layer] / common) if scales[layer] != common else up
        beside = [0, 0] * (up.ndim - 2)
        made[layer] = pad(down, [0, 0] * (down.ndim - 1) + [0, more]), pad(up, [*beside, 0, more])
    return rank, common * rank, made
