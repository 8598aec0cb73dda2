"""What is trained and what it is compared with: LoRA or all weights, and the frozen reference beside them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import set_adapter_layers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import Parameter

from ..rng import normal
from .guidance import Predict
from .lora_rank import require_rank
from .pipeline import TextToImage

MODES = ("lora", "full")

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The feed-forward and projection layers of attention blocks, and the convolutions of residual blocks.
WIDE = (
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
)
TARGETS = {"attention": ATTENTION, "wide": WIDE}


def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION,
    seed: int = 0,
) -> list[Parameter]:
    """Freeze the network and add a LoRA (Hu et al. 2021, arXiv 2106.09685) that changes nothing yet; returns its
    weights.

    The down-projections are normal with deviation 1/rank, drawn at the address (seed, "lora", layer), the
    up-projections 0.
    The weights are float32 whatever the network's precision. `alpha` (by default the rank) scales the update by
    alpha/rank.

    Raises:
        ValueError: a rank below 1 or above the width of a layer, a LoRA is already there, or no layer has such a name.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA is at least 1, not {rank}")
    require_no_lora(unet)
    layers = [name for name, _ in unet.named_modules()]
    if not any(name == target or name.endswith("." + target) for name in layers for target in targets):
        raise ValueError(f"no layer of the network is named like any of {', '.join(targets)}")
    require_rank({name: tuple(weight.shape) for name, weight in unet.named_parameters()}, rank, targets)
    unet.requires_grad_(False)
    strength = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=strength, target_modules=list(targets))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):  # peft draws its first weights from the global generator
        unet.add_adapter(config)
    for name, parameter in unet.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            parameter.data.copy_(normal(parameter.shape, seed, "lora", name) / rank)
        else:
            parameter.data.zero_()
    return trainable(unet, "lora")


def require_no_lora(unet: UNet2DConditionModel) -> None:
    """Raise ValueError where a LoRA is there already: the network's layers are then under other names."""
    if getattr(unet, "peft_config", None):
        raise ValueError("this network already has a LoRA: load the model again before adding another")


def trainable(unet: UNet2DConditionModel, mode: str) -> list[Parameter]:
    """The parameters that a mode trains, in the network's order: the LoRA's, or ("full") all, whose gradients are
    switched on.

    Raises ValueError for an unknown mode, and for "full" in half precision, where small updates would be rounded away.
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


def reference(model: TextToImage, mode: str) -> Predict:
    """The frozen model as `(x, t, text) -> output` float32, without gradients.

    With a LoRA it is the same network with the adapter switched off, so its precision path is the policy's and their
    difference at the start is exactly 0, at the cost of no memory. With full training it is a frozen copy, taken now.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "full":
        frozen = copy.copy(model)
        frozen.unet = copy.deepcopy(model.unet).requires_grad_(False)
        return torch.no_grad()(frozen.predict)

    if not any(isinstance(module, BaseTunerLayer) for module in model.unet.modules()):
        raise ValueError("this network has no LoRA to switch off: call add_lora first")

    @torch.no_grad()
    def without_adapter(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with _adapter_off(model.unet):
            return model.predict(x, t, text)

    return without_adapter


@contextmanager
def _adapter_off(network: torch.nn.Module) -> Iterator[None]:
    """By way of the layers, so that a wrapped network will do. peft switches their gradients off, and on again whether
    they were on or not: a frozen LoRA must come out frozen."""
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    set_adapter_layers(network, enabled=False)
    try:
        yield
    finally:
        set_adapter_layers(network, enabled=True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
