"""What is trained (a LoRA, or all weights) and the frozen reference that it is compared with."""

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

from diffusion_align.rng import normal
from diffusion_align.vocabulary import LORA_TARGETS, MODES

from ..guidance import Predict
from ..pipeline import TextToImage
from .rank import require_rank


def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = LORA_TARGETS["attention"],
    seed: int = 0,
) -> list[Parameter]:
    """Freeze the network, add a LoRA (Hu et al. 2021, arXiv 2106.09685), and return the LoRA's weights.

    The LoRA changes nothing yet: its up-projections are 0. Its down-projections are normal with deviation 1/rank,
    drawn at the address (seed, "lora", layer). Both are float32 whatever the network's precision. The update is scaled
    by alpha/rank; `alpha` is the rank by default.

    Raises:
        ValueError: the rank is below 1 or above the width of a layer, the network has a LoRA, or no layer has such a
            name.
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


def reference(model: TextToImage, mode: str) -> Predict:
    """The frozen model as `(x, t, text) -> output` float32, without gradients.

    With a LoRA it is the same network with the LoRA switched off: it costs no memory, rounds as the policy does, and
    equals it exactly before training. With full training it is a copy, taken now; call `trainable` before.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "full":
        frozen = copy.copy(model)
        # Its weights keep `requires_grad`: torch chooses a kernel by that, also where no gradient is taken.
        frozen.unet = copy.deepcopy(model.unet)
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
    """Switch the LoRA off layer by layer, which works for a wrapped network too.

    peft switches the gradients off and then on again, even those that were off before; a frozen LoRA must stay frozen.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    set_adapter_layers(network, enabled=False)
    try:
        yield
    finally:
        set_adapter_layers(network, enabled=True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
