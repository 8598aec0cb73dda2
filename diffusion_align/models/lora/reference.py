"""The frozen model that the policy is compared with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.utils import set_adapter_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import Parameter

from diffusion_align.vocabulary import MODES

from ..guidance import Predict
from ..pipeline import TextToImage
from .adapters import START, parameters_of, switch_on


def reference(model: TextToImage, mode: str) -> Predict:
    """The frozen model as `(x, t, text) -> output` float32, without gradients.

    With a LoRA it is the same network with the adapter switched off: it costs no memory, rounds as the policy does, and
    equals it exactly before training. If the LoRA started from another (`add_start`), that one alone is switched on.
    With full training it is a copy, taken now; call `trainable` before.
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

    has_start = START in (getattr(getattr(model.unet, "module", model.unet), "peft_config", None) or {})

    @torch.no_grad()
    def without_adapter(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with _only_start(model.unet) if has_start else _adapter_off(model.unet):
            return model.predict(x, t, text)

    return without_adapter


@contextmanager
def _adapter_off(network: torch.nn.Module) -> Iterator[None]:
    """Switch the adapter off layer by layer, which works for a wrapped network too."""
    with _same_gradients(network):
        set_adapter_layers(network, enabled=False)
        try:
            yield
        finally:
            set_adapter_layers(network, enabled=True)


@contextmanager
def _only_start(network: torch.nn.Module) -> Iterator[None]:
    """Switch on nothing but the frozen LoRA that the policy started from."""
    active = {module: module.active_adapters for module in network.modules() if isinstance(module, BaseTunerLayer)}
    beneath = any(START in names for names in active.values())
    with _same_gradients(network):
        switch_on(network, [START])
        if beneath:  # torch chooses a kernel by `requires_grad`, so it is as in the policy
            for parameter in parameters_of(network, START).values():
                parameter.requires_grad_(False)
        try:
            yield
        finally:
            for module, names in active.items():
                module.set_adapter(names)


@contextmanager
def _same_gradients(network: torch.nn.Module) -> Iterator[None]:
    """Restore what requires gradients: peft switches all on again, and a frozen LoRA must stay frozen."""
    flags: Mapping[Parameter, bool] = {parameter: parameter.requires_grad for parameter in network.parameters()}
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
