"""The folder that checkpoints lie in: which names are checkpoints, and how everything else goes away.

    step-00000200                a checkpoint
    .old-step-00000200           one that is just being replaced by another of its step; it counts until it is
    .tmp-...                     staged, or half removed: never a checkpoint
    .part-<name>.safetensors     what another process adds to the next checkpoint

Nothing here raises for what cannot be removed: the checkpoint that was saved is not the worse for it, so a warning
says what is in the way. Links are removed, never followed.
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
    """Checkpoint directories, newest first, one per step. Staged ones are not checkpoints."""
    by_step: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else []:
        name = path.name.removeprefix(".old-")
        if _NAME.fullmatch(name) and path.is_dir() and (name == path.name or not (folder / name).exists()):
            by_step[step_of(path)] = path
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def step_of(path: Path) -> int:
    name = _NAME.fullmatch(path.name.removeprefix(".old-"))
    if name is None:
        raise CheckpointError(f"{path} is no checkpoint: those are named step- and eight digits")
    return int(name[1])


def staging(final: Path) -> Path:
    return final.with_name(f".tmp-{final.name}")


def put(staged: Path, final: Path) -> None:
    """Make a staged checkpoint appear, in place of one of the same step if there is one."""
    if final.exists():
        os.replace(final, final.with_name(f".old-{final.name}"))  # found under this name, should the next line fail
    os.replace(staged, final)
    sync(final.parent)


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError, before anything is written, where fewer bytes are free than `needed` and a little."""
    disk = shutil.disk_usage(folder)
    needed += _SPARE_BYTES
    if 0 < disk.total and disk.free < needed:  # a total of 0: a file system that does not say
        raise OSError(f"it needs {needed} bytes and {disk.free} are free: make room, or keep fewer checkpoints")


def make(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)  # or a power cut could lose the folder with all that is synced in it


def prune(folder: Path, step: int, keep: int, protect: Collection[int]) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, and those of the `protect` steps."""
    try:
        # Later steps are of a run that was taken back to an earlier one: they neither count nor go.
        until_now = [path for path in found(folder) if step_of(path) <= step]
    except OSError as error:
        logger.warning("%s: older checkpoints stay (%s)", folder, error)
        return
    for path in until_now[keep:]:
        if step_of(path) not in protect:
            _retire(path)


def clean(folder: Path, spare: Collection[str] = ()) -> None:
    """Remove what interrupted saves left, but the parts named in `spare`; a replaced checkpoint that nothing took the
    place of gets its name back."""
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
    """Remove a directory, a file or a link; what is not there is fine, what will not go is warned of."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass  # somebody else was faster
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
        logger.warning("%s: leftovers stay (%s)", folder, error)
        return []
