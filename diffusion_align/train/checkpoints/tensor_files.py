"""Tensors as files of a checkpoint, and those that other processes of a job write for it."""

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
    """Write what this process adds to the next checkpoint, for the main one's `save`; each has a name of its own.

    Until then it lies, synced, in the checkpoints' folder under a hidden name. CheckpointError says why it does not.
    """
    require_group(name)
    folder = Path(folder)
    part = part_path(folder, name)
    unfinished = part.with_suffix(".tmp")
    try:
        make(folder)
        remove(unfinished)  # of a save that was killed
        require_space(folder, bytes_of(tensors))
        unfinished.mkdir()
        write_tensors(unfinished / part.name, tensors)
        sync(unfinished / part.name)
        os.replace(unfinished / part.name, part)
        sync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        remove(part)  # an earlier one, which must not pass for this one
        raise CheckpointError(f"{part}: could not be saved ({error}); earlier checkpoints are untouched") from error
    finally:
        remove(unfinished)
    return part


def part_path(folder: Path, name: str) -> Path:
    """Where `write_part` puts it, on whichever process."""
    return folder / f"{_PART}{name}{SUFFIX}"


def part_name(folder: Path, part: Path) -> str:
    """The name a part was written by; ValueError for what is none of this folder's."""
    if part.parent != folder or not (part.name.startswith(_PART) and part.suffix == SUFFIX):
        raise ValueError(f"{part} is no part of a checkpoint in {folder}: write_part makes them")
    return part.stem.removeprefix(_PART)


def take_part(part: Path, place: Path) -> None:
    """Move a part into a staged checkpoint, if it is the file it says it is."""
    if part.is_symlink():
        raise OSError(f"{part} is a link")
    os.replace(part, place)
    with safetensors.safe_open(place, "pt"):  # its header must fit its length, or a torn file would get a seal
        pass


def require_group(name: str) -> None:
    """ValueError for a name that could be more than a file's."""
    if not _GROUP.fullmatch(name):
        raise ValueError(f"group {name!r} is no name of lower-case letters, digits and _")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    safetensors.torch.save_file(_separate(tensors), file)
    # It is made for its owner's eyes only; others may read it if they may read the folder.
    file.chmod(file.parent.stat().st_mode & 0o666)


def read_tensors(file: Path) -> dict[str, Tensor]:
    # Copied: loaded tensors are views of the file, which will be pruned while they are in use; on a network disk, a
    # removed file cannot be read on.
    return {name: value.clone() for name, value in safetensors.torch.load_file(file).items()}


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU of which no two share memory, as safetensors wants them."""
    made: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in taken:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        made[name] = value
    return made
