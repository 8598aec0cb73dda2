"""Convert the data of a round to tensors for a checkpoint, and back.

The data are nested dataclasses. Their structure is written as JSON, stored as a tensor of bytes beside the other
tensors; reading creates only objects of known classes.
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
    """The name of the group in a checkpoint that holds the data of a round on one rank."""
    return f"round_{rank}"


def write_round(folder: Path, rank: int, round: Round[Any]) -> CheckpointError | None:
    """Write this rank's data of a round beside the checkpoints. Errors are returned: all ranks must agree on them."""
    try:
        files.write_part(folder, round_name(rank), pack_round(round))
    except CheckpointError as problem:
        return problem
    return None


def round_of(checkpoint: Checkpoint, rank: int, processes: int, chunks: Sequence[type]) -> Round[Any]:
    """A rank's data of the round inside which a checkpoint was saved. `chunks`: the allowed classes of chunks.

    Raises:
        CheckpointError: it was saved by another number of processes, or cannot be read.
    """
    saved = checkpoint.state["processes"]
    if saved != processes:
        raise CheckpointError(
            f"{checkpoint.path} was saved inside a round that {saved} processes drew, and there are now "
            f"{processes}: resume with {saved}, or from a checkpoint between rounds"
        )
    return unpack_round(checkpoint.tensors[round_name(rank)], chunks)


def pack_round(data: Round[Any]) -> dict[str, Tensor]:
    """One rank's data of a round as named tensors, for `checkpoint.save`."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_to_json(data, "round", tensors)).encode()
    return {**tensors, _SHAPE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def unpack_round(tensors: Mapping[str, Tensor], chunks: Sequence[type]) -> Round[Any]:
    """The inverse of `pack_round`. Raises CheckpointError for tensors that are not those of a round."""
    try:
        kinds = {kind.__name__: kind for kind in (*_KINDS, *chunks)}
        made = _from_json(json.loads(bytes(tensors[_SHAPE].tolist())), tensors, kinds)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's data of a round cannot be read ({error!r})") from error
    if not isinstance(made, Round):
        raise CheckpointError("the checkpoint's data of a round have another type")
    return made


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        fields = {field: _to_json(getattr(value, field), f"{name}.{field}", tensors) for field in names}
        return {"kind": type(value).__name__, "fields": fields}
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{name}: a checkpoint cannot hold a {type(value).__name__}")


def _from_json(shape: Any, tensors: Mapping[str, Tensor], kinds: Mapping[str, type]) -> Any:
    if isinstance(shape, list):
        return [_from_json(item, tensors, kinds) for item in shape]
    if not isinstance(shape, dict):
        return shape
    if "tensor" in shape:
        return tensors[shape["tensor"]]
    return kinds[shape["kind"]](**{name: _from_json(item, tensors, kinds) for name, item in shape["fields"].items()})
