"""Save and load checkpoints. A checkpoint is complete or does not exist, and loading verifies it.

    <folder>/step-00000200/  model.safetensors, optimizer.safetensors, ...   one file per group of tensors
                             state.json                                      everything else
                             manifest.json                                   size and sha256 of each file; written last

A checkpoint is written to a hidden directory, every file and directory is synced, and one rename publishes it; old
checkpoints are removed afterwards. Loading verifies every byte and falls back to the newest intact checkpoint. Only
safetensors and JSON are written and read, so no checkpoint can run code.
"""

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from diffusion_align.train.checkpoints.directory import clean, found, make, prune, put, require_space, staging, step_of
from diffusion_align.train.checkpoints.manifest import FORMAT, CheckpointError, checked_files, sync, write_manifest
from diffusion_align.train.checkpoints.tensor_files import (
    SUFFIX,
    bytes_of,
    part_name,
    part_path,
    read_tensors,
    require_group,
    take_part,
    write_part,
    write_tensors,
)

__all__ = [
    "FORMAT", "Checkpoint", "CheckpointError", "latest_good", "load", "part_path", "require_same_identity",
    "save", "write_part"
]  # fmt: skip

_STATE = "state.json"
logger = logging.getLogger(__name__)


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
    parts: Sequence[Path] = (),
) -> Path:
    """Write a checkpoint and then remove all but the newest `keep` and those of the `protect` steps.

    Call it on the main process only; `parts` are the files that `write_part` wrote on all ranks, and become groups of
    the checkpoint. CheckpointError reports a failure, such as a full disk: earlier checkpoints are untouched and
    training can continue. If the disk has too little room, it fails before anything is written.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder = Path(folder)
    taken = {part_name(folder, part): part for part in parts}
    _require_groups([*tensors, *(part_name(folder, part) for part in parts)])
    text = json.dumps(dict(state), allow_nan=False, indent=1)  # raises before anything is written
    final = folder / f"step-{step:08d}"
    staged = staging(final)
    try:
        make(folder)
        clean(folder, spare=taken)
        require_space(folder, sum(map(bytes_of, tensors.values())) + len(text))
        staged.mkdir()
        for group, values in tensors.items():
            write_tensors(staged / f"{group}{SUFFIX}", values)
        for group, part in taken.items():
            take_part(part, staged / f"{group}{SUFFIX}")
        (staged / _STATE).write_text(text, encoding="utf-8")
        for file in staged.iterdir():
            sync(file)
        write_manifest(staged, step)
        sync(staged)
        put(staged, final)
    except (OSError, SafetensorError) as error:
        clean(folder)
        raise CheckpointError(f"{final}: could not be saved ({error}); earlier checkpoints are untouched") from error
    prune(folder, step, keep, protect)
    clean(folder, spare=taken)
    return final


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Load one checkpoint after verifying every byte; CheckpointError names the file that is missing or changed."""
    path = Path(path)
    step = step_of(path)
    files = checked_files(path, step)
    if _STATE not in files:
        raise CheckpointError(f"{path / _STATE} is missing")
    tensors: dict[str, dict[str, Tensor]] = {}
    name = _STATE
    try:
        state = json.loads((path / name).read_bytes())
        for name in files:
            if name.endswith(SUFFIX):
                tensors[name.removesuffix(SUFFIX)] = read_tensors(path / name)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path / name} cannot be read ({error})") from error
    return Checkpoint(path, step, tensors, state)


def latest_good(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest intact checkpoint, or None if there is no checkpoint.

    For each damaged one a warning names its file. It only reads, so another process may be writing. Raises
    CheckpointError if there are checkpoints but all are damaged: a fresh start would then hide the loss.
    """
    problems = []
    for path in found(Path(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            problems.append(str(error))
            logger.warning("%s; falling back to the checkpoint before it", error)
    if problems:
        raise CheckpointError(f"{folder}: no checkpoint is intact. " + "; ".join(problems))
    return None


def require_same_identity(
    saved: Mapping[str, Any], current: Mapping[str, Any], words: Mapping[str, str] | None = None
) -> None:
    """Raise CheckpointError, with both values of each field that differs, unless a run is the one that was saved.

    `words`: by field, a sentence to print in place of two values that say nothing to a reader, such as digests.
    """
    # Through JSON like the saved identity, which turns tuples into lists.
    current = json.loads(json.dumps(dict(current)))
    names = [*saved, *(name for name in current if name not in saved)]
    differ = [
        (words or {}).get(name, f"{name} was {saved.get(name, 'absent')!r} and is now {current.get(name, 'absent')!r}")
        for name in names
        if name not in saved or name not in current or saved[name] != current[name]
    ]
    if differ:
        raise CheckpointError(
            f"this run is not the one that was saved: {'; '.join(differ)}. Resume with the "
            "saved settings, or start a new run folder"
        )


def _require_groups(groups: list[str]) -> None:
    for group in groups:
        require_group(group)
    if len(set(groups)) != len(groups):
        raise ValueError(f"two groups of a checkpoint have the same name: {', '.join(sorted(groups))}")
