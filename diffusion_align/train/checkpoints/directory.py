"""The folder of checkpoints: which names are checkpoints, and how old and unfinished ones are removed.

    step-00000200                a checkpoint
    .old-step-00000200           a checkpoint that is being replaced by a new one of its step; valid until that exists
    .tmp-...                     being written or removed: never a checkpoint
    .part-<name>.safetensors     tensors that another process adds to the next checkpoint

A file that cannot be removed causes a warning, not an error, because the saved checkpoint is complete. Links are
removed, never followed.
"""

import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from diffusion_align.train.checkpoints.manifest import CheckpointError, sync

_NAME = re.compile(r"step-(\d{8,})")
_SPARE_BYTES = 2**20  # for the headers of files, the manifest and the directory
logger = logging.getLogger(__name__)


def found(folder: Path) -> list[Path]:
    """Checkpoint directories, newest first, one per step."""
    by_step: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else []:
        name = path.name.removeprefix(".old-")
        if _NAME.fullmatch(name) and path.is_dir() and (name == path.name or not (folder / name).exists()):
            by_step[step_of(path)] = path
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def step_of(path: Path) -> int:
    name = _NAME.fullmatch(path.name.removeprefix(".old-"))
    if name is None:
        raise CheckpointError(f"{path} is no checkpoint: their names are step- and eight digits")
    return int(name[1])


def staging(final: Path) -> Path:
    return final.with_name(f".tmp-{final.name}")


def put(staged: Path, final: Path) -> None:
    """Rename a staged checkpoint to its final name, replacing one of the same step."""
    if final.exists():
        os.replace(final, final.with_name(f".old-{final.name}"))  # still found if the next line fails
    os.replace(staged, final)
    sync(final.parent)


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError, before anything is written, if there is not room for `needed` bytes and 1 MiB."""
    disk = shutil.disk_usage(folder)
    needed += _SPARE_BYTES
    if 0 < disk.total and disk.free < needed:  # a total of 0: the file system does not report it
        raise OSError(f"it needs {needed} bytes and {disk.free} are free: make room, or keep fewer checkpoints")


def make(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)  # or a power failure could lose the folder with everything in it


def prune(folder: Path, step: int, keep: int, protect: Collection[int]) -> None:
    """Of the checkpoints up to `step`, remove all but the newest `keep` and those of the `protect` steps."""
    try:
        # Checkpoints of later steps remain from before a resume at an earlier step: neither counted nor removed.
        until_now = [path for path in found(folder) if step_of(path) <= step]
    except OSError as error:
        logger.warning("%s: older checkpoints could not be removed (%s)", folder, error)
        return
    for path in until_now[keep:]:
        if step_of(path) not in protect:
            _retire(path)


def clean(folder: Path, spare: Collection[str] = ()) -> None:
    """Remove what interrupted saves left, except the parts named in `spare`. A checkpoint whose replacement does not
    exist gets its name back."""
    for old in _glob(folder, ".old-step-*"):
        final = folder / old.name.removeprefix(".old-")
        if final.exists():
            _retire(old)
        else:
            _rename(old, final)
    for path in _glob(folder, ".tmp-*"):
        remove(path)
    for path in _glob(folder, ".part-*"):
        if path.stem.removeprefix(".part-") not in spare:
            remove(path)


def remove(path: Path) -> None:
    """Remove a directory, a file or a link, if it exists; warn if it cannot be removed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass  # another process removed it
    except OSError as error:
        logger.warning("%s could not be removed (%s)", path, error)


def _retire(path: Path) -> None:
    # Renamed first, so that a half-removed directory is never taken for a checkpoint.
    gone = path.with_name(f".tmp-gone-{path.name}")
    if _rename(path, gone):
        remove(gone)


def _rename(path: Path, to: Path) -> bool:
    try:
        os.replace(path, to)
    except FileNotFoundError:
        return False
    except OSError as error:
        logger.warning("%s could not be renamed to %s (%s)", path, to.name, error)
        return False
    return True


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except OSError as error:
        logger.warning("%s: files of interrupted saves could not be listed (%s)", folder, error)
        return []
