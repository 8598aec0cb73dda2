"""Checkpoints that are whole or absent, and are never trusted unread.

    <folder>/step-00000200/  model.safetensors, optimizer.safetensors, ...   one file per group of tensors
                             state.json                                      everything else
                             manifest.json                                   size and sha256 of each file; written last

A checkpoint is staged in a hidden directory, every file and directory is synced, and one rename makes it appear; old
ones go only afterwards. Reading checks every byte and falls back to the newest checkpoint that is whole. Only
safetensors and JSON are written and read: nothing in a checkpoint can run code.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_GROUP = re.compile(r"[a-z][a-z0-9_]*")
logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or cannot be used; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: tensors by group and name, on the CPU, and the JSON state."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    folder: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    protect: Collection[int] = (),
) -> Path:
    """Write a checkpoint and, once it is durable, remove all but the newest `keep` (and those of the `protect` steps).

    On the main process only. When it fails (a full disk) the checkpoints from before are untouched, and
    CheckpointError says what happened; the training may go on.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    wrong = [group for group in tensors if not _GROUP.fullmatch(group)]
    if wrong:
        raise ValueError(f"group {wrong[0]!r} is no name of lower-case letters, digits and _")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    final = folder / f"step-{step:08d}"
    staged, old = folder / f".tmp-{final.name}", folder / f".old-{final.name}"
    try:
        staged.mkdir()
        for group, values in tensors.items():
            safetensors.torch.save_file(_separate(values), staged / f"{group}.safetensors")
        (staged / "state.json").write_text(json.dumps(dict(state), allow_nan=False, indent=1))
        for file in staged.iterdir():
            _sync(file)
        body = {"format": FORMAT, "step": step, "files": {file.name: _seal(file) for file in sorted(staged.iterdir())}}
        (staged / "manifest.json").write_text(json.dumps({"body": body, "sha256": _hash_json(body)}, indent=1))
        _sync(staged / "manifest.json")
        _sync(staged)
        if final.exists():
            os.replace(final, old)  # found by readers under this name, should the next line never be reached
        os.replace(staged, final)
        _sync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise CheckpointError(f"{final}: could not be saved ({error}); earlier checkpoints are untouched") from error
    # Later steps are of a run that was taken back to an earlier one: they neither count nor go.
    until_now = [path for path in _found(folder) if _step_of(path) <= step]
    for path in until_now[keep:]:
        if _step_of(path) not in protect:
            _remove(path)
    _clean(folder)
    return final


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Load one checkpoint after checking every byte; CheckpointError names the file that is missing or changed."""
    path = Path(path)
    body = _checked_manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in body["files"]:
        if name.endswith(".safetensors"):
            tensors[name.removesuffix(".safetensors")] = safetensors.torch.load_file(path / name)
    return Checkpoint(path, body["step"], tensors, json.loads((path / "state.json").read_text()))


def latest_good(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    For each broken one a warning names its file. It only reads, so another process may be writing. Raises
    CheckpointError when there are checkpoints but all are broken: starting afresh would then not be what anybody
    meant.
    """
    problems = []
    for path in _found(Path(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            problems.append(str(error))
            logger.warning("%s; falling back to the checkpoint before it", error)
    if problems:
        raise CheckpointError(f"{folder}: no checkpoint is whole. " + "; ".join(problems))
    return None


def require_same_identity(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise CheckpointError, with both values of each differing field, unless a run is the one that was saved."""
    # Through JSON, as the saved one went: a tuple is a list there.
    current = json.loads(json.dumps(dict(current)))
    names = [*saved, *(name for name in current if name not in saved)]
    differ = [
        f"{name} was {saved.get(name, 'absent')!r} and is now {current.get(name, 'absent')!r}"
        for name in names
        if name not in saved or name not in current or saved[name] != current[name]
    ]
    if differ:
        raise CheckpointError(
            f"this run is not the one that was saved: {'; '.join(differ)}. Resume with the "
            "saved settings, or start a new run folder"
        )


def _separate(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU of which no two share memory, as safetensors wants them."""
    made: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in values.items():
        value = value.detach().cpu().contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in taken:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        made[name] = value
    return made


def _found(folder: Path) -> list[Path]:
    """Checkpoint directories, newest first, one per step. Staged ones are not checkpoints."""
    by_step: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else []:
        name = path.name.removeprefix(".old-")
        if _NAME.fullmatch(name) and (name == path.name or not (folder / name).exists()):
            by_step[int(name.removeprefix("step-"))] = path
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _checked_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
        body = manifest["body"]
        whole = manifest["sha256"] == _hash_json(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is missing or damaged") from error
    if not whole:
        raise CheckpointError(f"{file} is damaged")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {body['format']}, this version reads {FORMAT}")
    if body["step"] != _step_of(path):
        raise CheckpointError(f"{file} is of step {body['step']}: the directory was renamed")
    for name, seal in body["files"].items():
        part = path / name
        if Path(name).name != name or part.is_symlink() or not part.is_file():
            raise CheckpointError(f"{part} is missing")
        if part.stat().st_size != seal["size"]:
            raise CheckpointError(f"{part} has {part.stat().st_size} bytes instead of {seal['size']}")
        if _seal(part) != seal:
            raise CheckpointError(f"{part} is damaged (its sha256 differs)")
    return body


def _seal(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a directory; a sync that fails for any other reason must not pass.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    # Renamed first, so that a half-removed directory is never taken for a checkpoint.
    gone = path.with_name(f".tmp-gone-{path.name}")
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Remove what interrupted saves left, and give a set-aside checkpoint its name back if nothing replaced it."""
    for old in folder.glob(".old-step-*"):
        final = folder / old.name.removeprefix(".old-")
        if final.exists():
            _remove(old)
        else:
            os.replace(old, final)
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
