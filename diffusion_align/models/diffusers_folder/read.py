"""Reads a model from a folder in diffusers' format, completely or not at all."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..components import Components
from ..hub import read_index
from ..prompts.conditioning import SIZES, SecondEncoder
from .weights import NoWeights, choose_weights, require_variant

NETWORKS = ("unet", "vae", "text_encoder")


def read_folder(folder: Path, dtype: torch.dtype, *, variant: str | None = None, vae: Any = None) -> Components:
    """The model in a folder. `vae` takes the place of the folder's.

    Raises:
        FileNotFoundError: a component is missing, or has no weights.
        ValueError: a component is damaged, or is not of a text-to-image model.
    """
    index = read_index(folder)
    sdxl = "text_encoder_2" in index
    require_variant(folder, (*NETWORKS, *(["text_encoder_2"] if sdxl else [])), variant)
    scheduler = _component(folder / "scheduler", lambda p: json.loads((p / "scheduler_config.json").read_text("utf-8")))

    def network(name: str, kind: Any) -> Any:
        return _component(folder / name, partial(_network, kind, dtype, variant))

    unet = network("unet", UNet2DConditionModel)
    second = None
    if sdxl:
        text_encoder = network("text_encoder_2", CLIPTextModelWithProjection)
        tokenizer = _component(folder / "tokenizer_2", CLIPTokenizer.from_pretrained)
        second = SecondEncoder(text_encoder, tokenizer, bool(index.get("force_zeros_for_empty_prompt", True)))
        _require_text_and_sizes(folder / "unet", unet.config, second.pooled_width)
    return Components(
        unet=unet,
        vae=vae if vae is not None else read_vae_folder(folder / "vae", dtype, sdxl=sdxl, variant=variant),
        text_encoder=network("text_encoder", CLIPTextModel),
        tokenizer=_component(folder / "tokenizer", CLIPTokenizer.from_pretrained),
        scheduler=scheduler,
        second=second,
    )


def read_vae_folder(folder: Path, dtype: torch.dtype, *, sdxl: bool, variant: str | None = None) -> AutoencoderKL:
    """A VAE's folder, in float32 where float16 would overflow. Raises as `read_folder`."""
    precision = _component(folder, partial(_vae_dtype, dtype)) if sdxl else dtype
    return _component(folder, partial(_network, AutoencoderKL, precision, variant))


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
    """Load a network; raise ValueError if weights are missing, which diffusers would fill at random with a warning.

    Pickled weights are read as data only, by diffusers and transformers alike.
    """
    weights = choose_weights(folder, variant)
    with torch.random.fork_rng(devices=[]):
        network, info = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=weights.variant,
            use_safetensors=weights.safetensors,
            output_loading_info=True,
        )
    if gaps := sorted(info["missing_keys"]):
        raise ValueError(f"{len(gaps)} weights are missing, the first is {gaps[0]}")
    return network


def _component(folder: Path, load: Any) -> Any:
    """Load one component; an error of any kind becomes one line that names its folder."""
    try:
        return load(folder)
    except NoWeights:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is incomplete: {_first_line(error)}; fetch the model again") from error
    except Exception as error:  # damaged weights raise a dozen kinds, from safetensors, torch, json and the loaders
        if ".bin" in str(error) or type(error).__name__ == "UnpicklingError":
            raise ValueError(
                f"{folder} could not be loaded: its .bin file holds Python objects beside tensors, or is damaged: "
                "use safetensors files of the model"
            ) from error
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{folder} could not be loaded: {_first_line(error)}; fetch the model again") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
