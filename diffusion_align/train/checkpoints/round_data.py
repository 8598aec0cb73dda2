"""A round's data as tensors for a checkpoint, and back: records within records, down to tensors and JSON.

What the records are is written in JSON, which goes as bytes among the tensors; only the classes below are made anew.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.samplers import StepTable
from diffusion_align.train.checkpoints import store as files
from diffusion_align.train.checkpoints.store import Checkpoint, CheckpointError
from diffusion_align.train.method import Round
from diffusion_align.trajectory import Trajectory

_KINDS: tuple[type, ...] = (Round, Trajectory, StepTable)
_SHAPE = "shape.json"


def round_name(rank: int) -> str:
    """The group of a checkpoint that holds what one process has of a round."""
    return f"round_{rank}"


def write_round(folder: Path, rank: int, round: Round[Any]) -> CheckpointError | None:
    """Write what this process has of a round beside the checkpoints; what went wrong, as another may have succeeded."""
    try:
        files.write_part(folder, round_name(rank), pack_round(round))
    except CheckpointError as problem:
        return problem
    return None


def round_of(checkpoint: Checkpoint, rank: int, processes: int, chunks: Sequence[type]) -> Round[Any]:
    """A rank's data of the round in whose middle a checkpoint was saved. `chunks`: the classes they may be of.

    Raises:
        CheckpointError: it was saved by another number of processes, or cannot be read.
    """
    saved = checkpoint.state["processes"]
    if saved != processes:
        raise CheckpointError(
            f"{checkpoint.path} is of the middle of a round, which {saved} processes had drawn, and there are now "
            f"{processes}: resume with {saved}, or from a checkpoint between rounds"
        )
    return unpack_round(checkpoint.tensors[round_name(rank)], chunks)


def pack_round(data: Round[Any]) -> dict[str, Tensor]:
    """One process's data of a round as named tensors, for `checkpoint.save`."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_down(data, "round", tensors)).encode()
    return {**tensors, _SHAPE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def unpack_round(tensors: Mapping[str, Tensor], chunks: Sequence[type]) -> Round[Any]:
    """The data again. Raises CheckpointError for tensors that are not those of a round."""
    try:
        kinds = {kind.__name__: kind for kind in (*_KINDS, *chunks)}
        made = _up(json.loads(bytes(tensors[_SHAPE].tolist())), tensors, kinds)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's data of a round cannot be read ({error!r})") from error
    if not isinstance(made, Round):
        raise CheckpointError("the checkpoint's data of a round are something else")
    return made


def _down(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list | tuple):
        return [_down(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
    if dataclasses.is_dataclass(value):
        fields = {f.name: _down(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, "fields": fields}
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} has no place in a checkpoint")


def _up(shape: Any, tensors: Mapping[str, Tensor], kinds: Mapping[str, type]) -> Any:
    if isinstance(shape, list):
        return [_up(part, tensors, kinds) for part in shape]
    if not isinstance(shape, dict):
        return shape
    if "tensor" in shape:
        return tensors[shape["tensor"]]
    return kinds[shape["kind"]](**{name: _up(part, tensors, kinds) for name, part in shape["fields"].items()})
