"""Convert a training run to tensors and JSON, and back: weights, optimizer, learning-rate schedule, EMA, progress."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from diffusion_align.train.checkpoints.store import Checkpoint, CheckpointError
from diffusion_align.train.ema import Ema
from diffusion_align.train.run import Progress


def pack(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    progress: Progress,
    ema: Ema | None = None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors, state) for `checkpoint.save`. `parameters`: by name, in the order that the optimizer has them."""
    tensors: dict[str, dict[str, Tensor]] = {"model": {name: p.detach() for name, p in parameters.items()}}
    tensors["optimizer"], optimizer_state = _flatten(optimizer, list(parameters))
    state: dict[str, Any] = {"progress": asdict(progress), "optimizer": optimizer_state}
    if lr_scheduler is not None:
        state["lr_scheduler"] = {k: v for k, v in lr_scheduler.state_dict().items() if k != "lr_lambdas"}
    if ema is not None:
        tensors["ema"] = dict(ema.average)
        state["ema"] = {"decay": ema.decay, "updates": ema.updates}
    return tensors, state


@torch.no_grad()
def restore(
    checkpoint: Checkpoint,
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    ema: Ema | None = None,
) -> Progress:
    """Load a checkpoint into these objects, in place, and return its progress.

    Raises CheckpointError, before anything is changed, unless names, shapes, types and optional entries match exactly.
    """
    tensors, state = checkpoint.tensors, checkpoint.state
    for entry, present in (("ema", ema is not None), ("lr_scheduler", lr_scheduler is not None)):
        if (entry in state) != present:
            raise CheckpointError(
                f"{checkpoint.path}: was saved {'with' if entry in state else 'without'} {entry}, unlike this run"
            )
    _require_match(checkpoint, "model", dict(parameters))
    for name, tensor in tensors["model"].items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{checkpoint.path / 'model.safetensors'}: {name!r} has values that are not finite")
    if ema is not None:
        _require_match(checkpoint, "ema", ema.average)
        if state["ema"]["decay"] != ema.decay:
            raise CheckpointError(f"{checkpoint.path}: ema decay was {state['ema']['decay']} and is now {ema.decay}")
    saved = state["optimizer"]
    if saved["class"] != type(optimizer).__name__ or saved["names"] != list(parameters):
        raise CheckpointError(
            f"{checkpoint.path}: was saved by {saved['class']} over other parameters or in another order"
        )

    for name, parameter in parameters.items():
        parameter.copy_(tensors["model"][name])
    _unflatten(optimizer, tensors["optimizer"], saved)
    if lr_scheduler is not None:
        lr_scheduler.load_state_dict(lr_scheduler.state_dict() | state["lr_scheduler"])
    if ema is not None:
        for name, average in ema.average.items():
            average.copy_(tensors["ema"][name])
        ema.updates = state["ema"]["updates"]
    progress: dict[str, Any] = dict(state["progress"])
    progress["norms"] = tuple(progress.get("norms", ()))  # JSON has lists only
    return Progress(**progress)


def _require_match(checkpoint: Checkpoint, group: str, wanted: Mapping[str, Tensor]) -> None:
    found = checkpoint.tensors.get(group, {})
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        here = "absent" if name not in wanted else f"{wanted[name].dtype} {list(wanted[name].shape)}"
        there = "absent" if name not in found else f"{found[name].dtype} {list(found[name].shape)}"
        if here != there:
            raise CheckpointError(f"{checkpoint.path / group}.safetensors: {name!r} is {there}, in this run {here}")


def _flatten(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer: tensors under "<parameter index>.<key>", and the rest as JSON."""
    state = optimizer.state_dict()
    if sum(len(group["params"]) for group in state["param_groups"]) != len(names):
        raise ValueError(f"the optimizer holds another number of parameters than the {len(names)} named ones")
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        values[str(index)] = {}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                values[str(index)][key] = value
    groups = state["param_groups"]
    return tensors, {"class": type(optimizer).__name__, "names": names, "groups": groups, "values": values}


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    entries: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in saved["values"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        entries[int(index)][name] = tensor
    groups = []
    for now, group in zip(optimizer.state_dict()["param_groups"], saved["groups"], strict=True):
        # JSON has turned tuples, such as betas, into lists.
        groups.append({k: tuple(v) if isinstance(now.get(k), tuple) else v for k, v in group.items()})
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
