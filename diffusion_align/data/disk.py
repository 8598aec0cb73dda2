"""Whether a disk has room for what is about to be written, asked before hours are spent on it."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion_align.data.layouts import Pair, Ranking
from diffusion_align.data.raw_rows import DataError


def bytes_of(
    pairs: Sequence[Pair] | Sequence[Ranking],
    prompts: int,
    latent_shape: tuple[int, ...],
    empty_text: Tensor,
    dtype: torch.dtype,
) -> int:
    """How large the encodings of pairs or rankings are at most: a picture that several name is counted once.

    Pictures that are the same by their bytes alone are not known to be so before they are read.
    """
    pictures = len({picture for pair in pairs for picture in pair.pictures})
    return (pictures * math.prod(latent_shape) + (prompts + 1) * empty_text.numel()) * dtype.itemsize


def require_room(folder: Path, size: int) -> None:
    """Raise DataError unless the disk of `folder` has room for `size` bytes, of which some may be there already."""
    there = sum(_size(path) for path in folder.glob("*.safetensors"))
    disk = shutil.disk_usage(folder)
    # Some network file systems say 0 of 0.
    if disk.total and size - there > disk.free:
        raise DataError(
            f"{folder}: encoding takes up to {_gigabytes(size - there)}, and the disk has {_gigabytes(disk.free)}; "
            "free some, delete caches of earlier runs beside it, or give --cache_dir on another disk"
        )


def _size(path: Path) -> int:
    """Bytes of a file, 0 if it is gone: another rank may have renamed it since the folder was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
