"""Load a model by name, completely or not at all, and choose how its attention is computed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..schedule import Schedule
from .components import Components
from .diffusers_folder.read import read_folder
from .hub import is_sdxl, locate, locate_vae
from .pipeline import TextToImage
from .single_file.contents import read_contents
from .single_file.kinds import SDXL, family_of
from .single_file.read import read_file
from .vae import read_vae


def load_pipeline(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
) -> TextToImage:
    """Load a Stable Diffusion 1.x, 2.x or XL model: a folder in diffusers format, a single file with the key names of
    the original code, a hub id, or "tiny", the embedded one.

    All components come in `dtype` whatever precision they are stored in, in eval mode, without gradients. The one
    exception: with float16, an SDXL VAE that overflows there (`force_upcast`) stays in float32. The default `device` is
    CUDA if there is one, else the CPU. `vae`, a folder or a file, takes the place of the model's own, and
    `prediction_type` that of what its scheduler's file says.

    Raises:
        FileNotFoundError: no such model, or one of its components is missing.
        ValueError: not a text-to-image model of these formats, a component is damaged, or the noise levels and the
            prediction type contradict each other.
    """
    place = locate(name_or_path, revision=revision, variant=variant)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    other = None if vae is None else read_vae(vae, dtype, sdxl=_has_second(place))
    if place.is_file():
        parts = read_file(place, dtype, prediction_type=prediction_type, vae=other)
    else:
        parts = read_folder(place, dtype, variant=variant, vae=other)
    _require_latents(place, parts, vae)
    given = prediction_type if prediction_type != parts.scheduler.get("prediction_type", "epsilon") else None
    scheduler = parts.scheduler | ({"prediction_type": given} if given else {})
    networks: list[Any] = [
        parts.unet,
        parts.vae,
        parts.text_encoder,
        *([parts.second.text_encoder] if parts.second else []),
    ]
    for network in networks:
        network.to(where).eval().requires_grad_(False)
    unet = parts.unet
    return TextToImage(
        unet=unet,
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        schedule=_schedule(place, scheduler),
        folder=place,
        source=os.fspath(name_or_path),
        device=where,
        dtype=dtype,
        second=parts.second,
        scheduler=scheduler,
        other_vae=None if vae is None else locate_vae(vae),
        other_prediction_type=prediction_type if place.is_file() else given,
    )


def set_attention(unet: UNet2DConditionModel, *, xformers: bool = False, gradient_checkpointing: bool = False) -> None:
    """Choose the attention kernel (PyTorch's own, or xformers), and whether activations are recomputed in the backward
    pass, which takes less memory and more time.

    Raises:
        ValueError: xformers is not installed, or the network is not on a CUDA device.
    """
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()  # works in eval mode too, where dropout is off
    else:
        unet.disable_gradient_checkpointing()
    if not xformers:
        return
    if importlib.util.find_spec("xformers") is None:
        raise ValueError(
            "xformers is not installed: pip install 'diffusion_align[xformers]', or use PyTorch's own attention, "
            "which is as fast"
        )
    if unet.device.type != "cuda":
        raise ValueError(f"xformers has no kernel for {unet.device.type}: use PyTorch's own attention")
    unet.enable_xformers_memory_efficient_attention()


def _has_second(place: Path) -> bool:
    """Whether the model is an SDXL."""
    return family_of(read_contents(place)) == SDXL if place.is_file() else is_sdxl(place)


def _require_latents(place: Path, parts: Components, vae: Any) -> None:
    taken, given = parts.unet.config["in_channels"], parts.vae.config["latent_channels"]
    if taken == given:
        return
    if vae is not None:
        raise ValueError(f"{vae} makes latents of {given} channels and {place} takes {taken}: a VAE of other models")
    raise ValueError(
        f"{place / 'unet'} takes {taken} channels and the VAE makes {given}: "
        "an inpainting or depth model, which is not supported; use its text-to-image base"
    )


def _schedule(place: Path, config: dict[str, Any]) -> Schedule:
    """The noise levels; ValueError if they end in pure noise and the network predicts that noise."""
    schedule = Schedule.from_config(config)
    if schedule.zero_terminal and schedule.prediction_type == "epsilon":
        raise ValueError(
            f"{place} has zero terminal SNR and predicts epsilon: at its last step, pure noise, epsilon says nothing "
            "of the picture. Its prediction_type is v_prediction, or its scheduler must not set rescale_betas_zero_snr"
        )
    return schedule
