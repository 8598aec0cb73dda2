"""What is trained: a LoRA, which may start from a trained one, or all weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import Parameter

from diffusion_align.rng import normal
from diffusion_align.vocabulary import LORA_TARGETS, MODES

from .files import Lora
from .rank import require_rank

TRAINED, START = "default", "start"  # peft's names of the LoRA that is trained, and of a frozen one that it starts from


def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = LORA_TARGETS["attention"],
    seed: int = 0,
    *,
    dora: bool = False,
) -> list[Parameter]:
    """Freeze the network, add a LoRA (Hu et al. 2021, arXiv 2106.09685), and return the LoRA's weights.

    The LoRA changes nothing yet: its up-projections are 0. Its down-projections are normal with deviation 1/rank,
    drawn at the address (seed, "lora", layer). Both are float32 whatever the network's precision. The update is scaled
    by alpha/rank; `alpha` is the rank by default. `dora` adds a magnitude for each output of a layer, which starts as
    that of its weight (Liu et al. 2024, arXiv 2402.09353).

    A frozen LoRA that `add_start` has added stays beneath the new one.

    Raises:
        ValueError: the rank is below 1 or above the width of a layer, the network has a LoRA, or no layer has such a
            name.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA is at least 1, not {rank}")
    if START not in getattr(unet, "peft_config", {}):
        require_no_lora(unet)
    layers = [name for name, _ in unet.named_modules()]
    if not any(name == target or name.endswith("." + target) for name in layers for target in targets):
        raise ValueError(f"no layer of the network is named like any of {', '.join(targets)}")
    shapes = {name.replace(".base_layer.", "."): tuple(w.shape) for name, w in unet.named_parameters()}
    require_rank({name: shape for name, shape in shapes.items() if "lora_" not in name}, rank, targets)
    _add_adapter(unet, TRAINED, rank, alpha, targets, dora)
    with torch.no_grad():
        for name, parameter in parameters_of(unet, TRAINED).items():
            if "lora_A" in name:
                parameter.copy_(normal(parameter.shape, seed, "lora", name) / rank)
            elif "lora_B" in name:
                parameter.zero_()
    return trainable(unet, "lora")


def add_start(unet: UNet2DConditionModel, lora: Lora) -> None:
    """Freeze the network and add a trained LoRA, frozen too, under a name of its own. It is switched on."""
    require_no_lora(unet)
    _add_adapter(unet, START, lora.rank, lora.alpha, list(lora.pairs), bool(lora.magnitudes))
    fill_lora(unet, lora, START)
    unet.requires_grad_(False)


def continue_start(unet: UNet2DConditionModel, lora: Lora) -> list[Parameter]:
    """Add a copy of the LoRA of `add_start` that is trained in its place; returns its weights."""
    _add_adapter(unet, TRAINED, lora.rank, lora.alpha, list(lora.pairs), bool(lora.magnitudes))
    fill_lora(unet, lora, TRAINED)
    switch_on(unet, [TRAINED])
    return trainable(unet, "lora")


@torch.no_grad()
def fill_lora(unet: UNet2DConditionModel, lora: Lora, adapter: str = TRAINED) -> None:
    """Copy a LoRA's values into an adapter of the same layers."""
    for name, parameter in parameters_of(unet, adapter).items():
        layer, _, inner = name.partition(".lora_")
        half = inner.partition(".")[0]
        if half == "magnitude_vector":
            parameter.copy_(lora.magnitudes[layer].view_as(parameter))
        else:
            parameter.copy_(lora.pairs[layer][half == "B"])


def _add_adapter(
    unet: UNet2DConditionModel, name: str, rank: int, alpha: float | None, targets: Sequence[str], dora: bool
) -> None:
    """Add an adapter in float32, which alone gets gradients; others stay switched on."""
    unet.requires_grad_(False)
    strength = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=strength, target_modules=list(targets), use_dora=dora)  # type: ignore[arg-type]
    others = list(getattr(unet, "peft_config", None) or {})
    # peft draws its first weights from the global generator, and warns of a second adapter.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        unet.add_adapter(config, name)
    if others:
        switch_on(unet, [*others, name])
    own = parameters_of(unet, name)
    for key, parameter in unet.named_parameters():
        parameter.requires_grad_(key in own)
        if key in own:
            parameter.data = parameter.data.float()


def parameters_of(unet: torch.nn.Module, adapter: str) -> dict[str, Parameter]:
    """The weights of one adapter, by name."""
    return {key: p for key, p in unet.named_parameters() if ".lora_" in key and f".{adapter}." in key}


def require_no_lora(unet: UNet2DConditionModel) -> None:
    """Raise ValueError if the network has a LoRA, because its layers then have other names."""
    if getattr(unet, "peft_config", None):
        raise ValueError("this network already has a LoRA: load the model again before adding another")


def trainable(unet: UNet2DConditionModel, mode: str) -> list[Parameter]:
    """The parameters that a mode trains, in the network's order: the LoRA's, or with "full" all of them.

    "full" switches their gradients on. Raises ValueError for an unknown mode, and for "full" in half precision, where
    small updates would be rounded away.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
    has_lora = bool(getattr(unet, "peft_config", None))
    if mode == "lora" and not has_lora:
        raise ValueError("this network has no LoRA to train: call add_lora first")
    if mode == "full":
        if has_lora:
            raise ValueError("this network has a LoRA: load the model again to train all of it")
        if unet.dtype != torch.float32:
            raise ValueError(
                f"full fine-tuning needs float32 weights, not {unet.dtype}: load the model with dtype=torch.float32"
            )
        unet.requires_grad_(True)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def switch_on(network: torch.nn.Module, names: Sequence[str]) -> None:
    """Switch adapters on, and all others off, in each layer that has an adapter."""
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(list(names))
