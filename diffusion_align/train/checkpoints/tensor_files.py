"""Tensor files of a checkpoint, and the parts that each process writes for it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from diffusion_align.train.checkpoints.directory import make, remove, require_space
from diffusion_align.train.checkpoints.manifest import CheckpointError, sync

SUFFIX = ".safetensors"
_PART = ".part-"
_GROUP = re.compile(r"[a-z][a-z0-9_]*")


def write_part(folder: str | os.PathLike[str], name: str, tensors: Mapping[str, Tensor]) -> Path:
    """Write a part: tensors of this process that `save` on the main process moves into the next checkpoint.

    Until then the part is a synced hidden file in the folder of checkpoints. Each process uses a name of its own.
    Raises CheckpointError if it cannot be written.
    """
    require_group(name)
    folder = Path(folder)
    part = part_path(folder, name)
    unfinished = part.with_suffix(".tmp")
    try:
        make(folder)
        remove(unfinished)  # left by a killed save
        require_space(folder, bytes_of(tensors))
        unfinished.mkdir()
        write_tensors(unfinished / part.name, tensors)
        sync(unfinished / part.name)
        os.replace(unfinished / part.name, part)
        sync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        remove(part)  # an older part must not be taken for this one
        raise CheckpointError(f"{part}: could not be saved ({error}); earlier checkpoints are untouched") from error
    finally:
        remove(unfinished)
    return part


def part_path(folder: Path, name: str) -> Path:
    """The file that `write_part` writes."""
    return folder / f"{_PART}{name}{SUFFIX}"


def part_name(folder: Path, part: Path) -> str:
    """The name of a part; ValueError for a file that is not a part in this folder."""
    if part.parent != folder or not (part.name.startswith(_PART) and part.suffix == SUFFIX):
        raise ValueError(f"{part} is no part of a checkpoint in {folder}: write_part makes them")
    return part.stem.removeprefix(_PART)


def take_part(part: Path, place: Path) -> None:
    """Move a part into a staged checkpoint; raises if it is a link or no complete safetensors file."""
    if part.is_symlink():
        raise OSError(f"{part} is a link")
    os.replace(part, place)
    with safetensors.safe_open(place, "pt"):  # raises for a torn file, which the manifest must not certify
        pass


def require_group(name: str) -> None:
    """Raise ValueError for a name that is not a plain file name."""
    if not _GROUP.fullmatch(name):
        raise ValueError(f"group {name!r} is no name of lower-case letters, digits and _")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    safetensors.torch.save_file(_separate(tensors), file)
    # safetensors makes files that only the owner can read; here they get the permissions of the folder.
    file.chmod(file.parent.stat().st_mode & 0o666)


def read_tensors(file: Path) -> dict[str, Tensor]:
    # Copied, because loaded tensors are views of the file: it may be removed while they are in use, and on a network
    # disk they could then no longer be read.
    return {name: value.clone() for name, value in safetensors.torch.load_file(file).items()}


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two of which share memory, as safetensors requires."""
    made: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in taken:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        made[name] = value
    return made
