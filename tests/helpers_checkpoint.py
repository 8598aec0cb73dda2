"""What a checkpoint of a step holds in these tests, and whether it does."""

import torch

from diffusion_align import rng


def content(step, size=1000):
    """Tensors and state that differ at every step and name it."""
    values = {"a": rng.normal((size,), step, "checkpoint"), "b": torch.tensor(step), "c": torch.zeros(0, 3)}
    return {"model": values, "optimizer": {"0.step": torch.tensor(float(step))}}, {
        "step": step,
        "text": "é",
        "rate": 0.1,
    }


def is_content(loaded, size=1000):
    tensors, state = content(loaded.step, size)
    return loaded.state == state and all(
        torch.equal(loaded.tensors[group][name], value) and loaded.tensors[group][name].dtype == value.dtype
        for group, values in tensors.items()
        for name, value in values.items()
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())
