"""How attention is computed: PyTorch's scaled-dot-product attention unless xformers is asked for and can run."""

from __future__ import annotations

import importlib.util

from diffusers import UNet2DConditionModel


def set_attention(unet: UNet2DConditionModel, *, xformers: bool = False, gradient_checkpointing: bool = False) -> None:
    """Choose the attention kernel, and whether activations are recomputed in the backward pass (less memory, more
    time).

    Raises:
        ValueError: xformers was asked for where it is not installed or where there is no CUDA device.
    """
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()  # works in eval mode too, which keeps any dropout asleep
    else:
        unet.disable_gradient_checkpointing()
    if not xformers:
        return
    if importlib.util.find_spec("xformers") is None:
        raise ValueError(
            "xformers is not installed: pip install 'diffusion_align[xformers]', or leave out "
            "--enable_xformers_memory_efficient_attention (PyTorch's own attention is as fast)"
        )
    if unet.device.type != "cuda":
        raise ValueError(
            f"xformers has no kernel for {unet.device.type}: leave out --enable_xformers_memory_efficient_attention"
        )
    unet.enable_xformers_memory_efficient_attention()
