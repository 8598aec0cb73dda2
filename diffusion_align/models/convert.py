"""Writes a model, whatever files it came from, in another format."""

from __future__ import annotations

from pathlib import Path

import torch

from .diffusers_folder.write import write_folder
from .pipeline import TextToImage
from .single_file.write import States, family_of, modelspec, save_single_file


def write_model(model: TextToImage, place: Path, dtype: torch.dtype, *, one_file: bool, title: str) -> Path:
    """Write a model as a folder in diffusers' format, or as one file with the original code's key names."""
    if not one_file:
        return write_folder(model, place, dtype)
    states = states_of(model)
    return save_single_file(
        place,
        states,
        dtype=dtype,
        metadata=modelspec(family_of(states), model.prediction_type, model.resolution, title),
        v_prediction=model.prediction_type == "v_prediction",
        zero_terminal_snr=model.schedule.zero_terminal,
    )


def states_of(model: TextToImage) -> States:
    """The tensors of each network by its name."""
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    networks |= {"text_encoder_2": model.second.text_encoder} if model.second else {}
    return {name: network.state_dict() for name, network in networks.items()}
