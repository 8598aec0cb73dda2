"""A VAE by itself, which takes the place of a model's own."""

from __future__ import annotations

import os
from typing import Any

import torch

from .diffusers_folder.read import read_vae_folder
from .hub import locate_vae
from .single_file.kinds import SD1, SDXL
from .single_file.read import read_vae as read_vae_file


def read_vae(name: str | os.PathLike[str], dtype: torch.dtype, *, sdxl: bool) -> Any:
    """The VAE in a file, in its folder, in the folder of a model that has it, or on the hub.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    place = locate_vae(name)
    if place.is_file():
        wide = torch.float32 if sdxl and dtype == torch.float16 else dtype  # float16 overflows in SDXL's own VAE
        return read_vae_file(place, wide, family=SDXL if sdxl else SD1, resolution=1024 if sdxl else 512)
    return read_vae_folder(place, dtype, sdxl=sdxl)
