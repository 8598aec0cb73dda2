"""Load a model by name, completely or not at all, and choose how its attention is computed."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..schedule import Schedule
from .hub import locate, read_index
from .pipeline import TextToImage
from .prompts.conditioning import SIZES, SecondEncoder


def load_pipeline(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> TextToImage:
    """Load a Stable Diffusion 1.x, 2.x or XL format model: a folder, a hub id, or "tiny", the embedded one.

    All components come in `dtype` whatever precision they are stored in, in eval mode, without gradients. The one
    exception: with float16, an SDXL VAE that overflows there (`force_upcast`) stays in float32. The default `device` is
    CUDA if there is one, else the CPU.

    Raises:
        FileNotFoundError: no such model, or one of its components is missing.
        ValueError: not a text-to-image model of these formats, or a component is damaged.
    """
    folder = locate(name_or_path, revision=revision, variant=variant)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    index = read_index(folder)
    sdxl = "text_encoder_2" in index
    scheduler = _component(folder / "scheduler", lambda p: json.loads((p / "scheduler_config.json").read_text("utf-8")))

    def network(name: str, kind: Any, precision: torch.dtype = dtype) -> Any:
        loaded = _component(folder / name, partial(_network, kind, precision, variant))
        return loaded.to(where).eval().requires_grad_(False)

    unet = network("unet", UNet2DConditionModel)
    vae = network("vae", AutoencoderKL, _component(folder / "vae", partial(_vae_dtype, dtype)) if sdxl else dtype)
    taken, given = unet.config["in_channels"], vae.config["latent_channels"]
    if taken != given:
        raise ValueError(
            f"{folder / 'unet'} takes {taken} channels and the VAE makes {given}: "
            "an inpainting or depth model, which is not supported; use its text-to-image base"
        )
    second = None
    if sdxl:
        text_encoder = network("text_encoder_2", CLIPTextModelWithProjection)
        tokenizer = _component(folder / "tokenizer_2", CLIPTokenizer.from_pretrained)
        second = SecondEncoder(text_encoder, tokenizer, bool(index.get("force_zeros_for_empty_prompt", True)))
        _require_text_and_sizes(folder / "unet", unet.config, second.pooled_width)
    return TextToImage(
        unet=unet,
        vae=vae,
        text_encoder=network("text_encoder", CLIPTextModel),
        tokenizer=_component(folder / "tokenizer", CLIPTokenizer.from_pretrained),
        schedule=Schedule.from_config(scheduler),
        folder=folder,
        source=os.fspath(name_or_path),
        device=where,
        dtype=dtype,
        second=second,
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


def _vae_dtype(dtype: torch.dtype, folder: Path) -> torch.dtype:
    """Float32 where float16 would overflow; bfloat16 has float32's range, and diffusers keeps it too.

    It must be known before loading, because rounding to float16 cannot be undone.
    """
    upcast = json.loads((folder / "config.json").read_text("utf-8")).get("force_upcast", True)  # diffusers' default
    return torch.float32 if upcast and dtype == torch.float16 else dtype


def _require_text_and_sizes(folder: Path, config: Any, pooled_width: int) -> None:
    """Raise ValueError unless the network takes a pooled embedding and six sizes; a refiner takes five numbers."""
    kind, taken = config["addition_embed_type"], config["projection_class_embeddings_input_dim"]
    needed = pooled_width + SIZES * (config["addition_time_embed_dim"] or 0)
    if (kind, taken) != ("text_time", needed):
        raise ValueError(
            f"{folder} takes {taken} numbers ({kind}) beside the text, an SDXL base model {needed} (text_time): "
            "refiners and other relatives are not supported"
        )


def _network(kind: Any, dtype: torch.dtype, variant: str | None, folder: Path) -> Any:
    """Load a network; raise ValueError if weights are missing, which diffusers would fill at random with a warning."""
    with torch.random.fork_rng(devices=[]):
        network, info = kind.from_pretrained(
            folder, torch_dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True
        )
    if gaps := sorted(info["missing_keys"]):
        raise ValueError(f"{len(gaps)} weights are missing, the first is {gaps[0]}")
    return network


def _component(folder: Path, load: Any) -> Any:
    """Load one component; an error of any kind becomes one line that names its folder."""
    try:
        return load(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is incomplete: {_first_line(error)}; fetch the model again") from error
    except Exception as error:  # damaged weights raise a dozen kinds, from safetensors, torch, json and the loaders
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{folder} could not be loaded: {_first_line(error)}; fetch the model again") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
