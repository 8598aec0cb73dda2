"""Pictures for evaluation: the same prompt and seed give the same picture, whatever the batch size and whichever model.

Base and tuned model therefore start every prompt from the same noise, and what differs between two pictures is the
model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.images import ImageError, decode_image, encode_png
from ..prediction import Denoiser
from ..rng import draw_normal, generator
from ..samplers import StepTable, sample, step_table
from ..schedule import Schedule

PURPOSE = "evaluation"
MANIFEST = "pictures.json"

Batch = tuple[list[int], Tensor]  # indices of the prompts, pictures [b,3,H,W] float32 in [0, 1] on the CPU


class Gate(Protocol):
    """What generation asks of a model; `models.TextToImage` has it."""

    @property
    def device(self) -> torch.device: ...
    def encode_text(self, prompts: list[str]) -> Tensor: ...
    def denoiser(self, text: Tensor, guidance: float = 1.0) -> Denoiser: ...
    def latent_shape(self) -> tuple[int, ...]: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def fingerprint(self) -> str: ...


def evaluation_table(schedule: Schedule, steps: int) -> StepTable:
    """The pinned sampler of every evaluation here: DPM-Solver++ 2M as an ODE, trailing spacing, down to sigma = 0."""
    return step_table(schedule, steps, solver="dpmpp", order=2, eta=0.0, spacing="trailing", final="zero")


@torch.no_grad()
def _draw(gate: Gate, prompts: list[str], indices: list[int], seed: int, table: StepTable, guidance: float) -> Tensor:
    sources = [generator(seed, PURPOSE, index) for index in indices]  # each goes on to the noise of stochastic steps
    noise = torch.stack([draw_normal(gate.latent_shape(), source) for source in sources]).to(gate.device)
    denoiser = gate.denoiser(gate.encode_text(prompts), guidance=guidance)
    images = gate.decode(sample(denoiser, table, noise, sources)).float().cpu()
    for index, image in zip(indices, images, strict=True):
        if not torch.isfinite(image).all():
            raise ValueError(f"the picture of prompt {index} is not finite: the model has diverged")
    return images


def generate(
    gate: Gate,
    prompts: Sequence[str],
    *,
    seed: int,
    table: StepTable,
    guidance: float,
    batch_size: int,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Draw the picture of each prompt, batch after batch.

    All randomness of picture i is at the address (seed, "evaluation", i), i being the prompt's place in the list.

    Args:
        gate: the model, as `models.load_pipeline` gives it.
        prompts: N prompts.
        table: the sampler's steps, usually `evaluation_table`; a stochastic one will do as well.
        guidance: classifier-free guidance scale; 1 is none.
        indices: which of the prompts to draw; all, unless they are given.

    Yields:
        Indices of b prompts and their pictures [b,3,H,W], float32 in [0, 1], on the CPU.

    Raises:
        ValueError: a batch size below 1, or a picture with numbers that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    wanted = list(range(len(prompts))) if indices is None else list(indices)
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        yield part, _draw(gate, [prompts[i] for i in part], part, seed, table, guidance)


def picture_path(folder: str | Path, index: int) -> Path:
    """Where a prompt's picture lies: a number, never the prompt's own text, which may be hostile as a file name."""
    return Path(folder) / f"{index:04d}.png"


def read_picture(folder: str | Path, index: int) -> Tensor:
    """One saved picture [3,H,W] in [0, 1]. Raises ImageError (a ValueError) or FileNotFoundError naming the file."""
    path = picture_path(folder, index)
    try:
        image = decode_image(path.read_bytes())
    except ImageError as error:
        raise ImageError(f"{path} {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32) / 255


def read_pictures(folder: str | Path, n: int, batch_size: int = 64) -> Iterator[Batch]:
    """The first n saved pictures in order, in the form in which `generate` yields them."""
    for start in range(0, n, batch_size):
        part = list(range(start, min(start + batch_size, n)))
        yield part, torch.stack([read_picture(folder, index) for index in part])


def table_digest(table: StepTable) -> str:
    """A short hash of the numbers that make two samplers the same."""
    parts = (table.timesteps, table.cx, table.c, table.std)
    return hashlib.blake2b(b"".join(p.double().cpu().numpy().tobytes() for p in parts), digest_size=8).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    """Write so that a file of this name is always a whole one, whenever the process is killed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _claim(folder: Path, prompts: list[str], facts: dict[str, Any]) -> None:
    """Write down what the folder's pictures are, or refuse it when they are something else."""
    path = folder / MANIFEST
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        known = old.pop("prompts")
        other = sorted(key for key in old.keys() | facts.keys() if old.get(key) != facts.get(key))
        if other:
            raise ValueError(f"{folder} holds pictures made with another {', '.join(other)}: choose a new folder")
        changed = next((i for i, (a, b) in enumerate(zip(known, prompts, strict=False)) if a != b), None)
        if changed is not None:
            raise ValueError(f"{folder} holds pictures of other prompts (number {changed}): choose a new folder")
        prompts = max(known, prompts, key=len)
    text = json.dumps({**facts, "prompts": prompts}, indent=1, sort_keys=True)
    _replace(path, text.encode("utf-8"))


def save_pictures(
    gate: Gate,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    seed: int,
    table: StepTable,
    guidance: float,
    batch_size: int,
    facts: Mapping[str, Any] | None = None,
) -> Iterator[list[int]]:
    """Generate into a folder, 0000.png and so on, yielding the indices just written; what is there already stays.

    `pictures.json` records seed, guidance, sampler, model and prompts; a folder made otherwise is refused, so a
    resumed run never mixes two models. `facts` joins that record: name the adapter there, for the gate's fingerprint
    knows files only. The list of prompts may grow or shrink at its end between runs.

    Raises:
        ValueError: the folder holds other pictures, and as `generate`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = {"seed": seed, "guidance": float(guidance), "steps": len(table), "sampler": table_digest(table)}
    _claim(folder, list(prompts), {**made, "model": gate.fingerprint(), **(facts or {})})
    missing = [index for index in range(len(prompts)) if not _is_whole(folder, index)]
    for indices, images in generate(
        gate, prompts, seed=seed, table=table, guidance=guidance, batch_size=batch_size, indices=missing
    ):
        for index, image in zip(indices, images, strict=True):
            _replace(picture_path(folder, index), encode_png(image))
        yield indices


def _is_whole(folder: Path, index: int) -> bool:
    try:
        read_picture(folder, index)
    except (ImageError, FileNotFoundError):
        return False
    return True
