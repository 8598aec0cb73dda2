"""Checkpoints that are whole or absent, and are never trusted unread.

    <folder>/step-00000200/  model.safetensors, optimizer.safetensors, ...   one file per group of tensors
                             state.json                                      everything else
                             manifest.json                                   size and sha256 of each file; written last

A checkpoint is staged in a hidden directory, every file and directory is synced, and one rename makes it appear; old
ones go only afterwards. Reading checks every byte and falls back to the newest checkpoint that is whole. Only
safetensors and JSON are written and read: nothing in a checkpoint can run code.
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
    """Write a checkpoint and, once it is durable, remove all but the newest `keep` (and those of the `protect` steps).

    On the main process only; `parts` are what `write_part` returned on the others, and become groups like the rest.
    When it fails (a full disk) the checkpoints from before are untouched, and CheckpointError says what happened; the
    training may go on. It fails before anything is written where the disk has too little room.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder = Path(folder)
    taken = {part_name(folder, part): part for part in parts}
    _require_groups([*tensors, *(part_name(folder, part) for part in parts)])
    text = json.dumps(dict(state), allow_nan=False, indent=1)  # what is no JSON fails here, with nothing written
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
    """Load one checkpoint after checking every byte; CheckpointError names the file that is missing or changed."""
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
    """The newest checkpoint that is whole, or None where there is none at all.

    For each broken one a warning names its file. It only reads, so another process may be writing. Raises
    CheckpointError when there are checkpoints but all are broken: starting afresh would then not be what anybody
    meant.
    """
    problems = []
    for path in found(Path(folder)):
        try:
            return load(path)
        except CheckpointError as error:
            problems.append(str(error))
            logger.warning("%s; falling back to the checkpoint before it", error)
    if problems:
        raise CheckpointError(f"{folder}: no checkpoint is whole. " + "; ".join(problems))
    return None


def require_same_identity(
    saved: Mapping[str, Any], current: Mapping[str, Any], words: Mapping[str, str] | None = None
) -> None:
    """Raise CheckpointError, with both values of each differing field, unless a run is the one that was saved.

    `words` say instead what a field's difference means, where two values, such as digests, do not.
    """
    # Through JSON, as the saved one went: a tuple is a list there.
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
