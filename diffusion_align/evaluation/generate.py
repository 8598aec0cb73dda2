"""Pictures for evaluation: the same prompt and seed give the same picture, whatever the batch size and whichever model.

Base and tuned model therefore start every prompt from the same noise, and what differs between two pictures is the
model. Pictures are numbered through: number p of K pictures a prompt is picture p mod K of prompt p div K.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
METADATA = "metadata.jsonl"

Batch = tuple[list[int], Tensor]  # numbers of the pictures, pictures [b,3,H,W] float32 in [0, 1] on the CPU


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


def sampler_table(schedule: Schedule, solver: str, steps: int) -> StepTable:
    """The pinned sampler "dpmpp", or beside it "ddim" (eta = 0) on the same grid: a second look at the same models.

    Which sampler draws can turn the order of two models around (SPO's issue 12). Raises ValueError for other names.
    """
    if solver == "dpmpp":
        return evaluation_table(schedule, steps)
    if solver != "ddim":
        raise ValueError(f"evaluation draws by dpmpp or ddim, not {solver!r}")
    return step_table(schedule, steps, solver="ddim", order=1, eta=0.0, spacing="trailing", final="zero")


def address(number: int, per_prompt: int) -> tuple[int, ...]:
    """Where a picture's randomness lies, below (seed, "evaluation"): its prompt, and which of the prompt's pictures.

    The first picture of a prompt is the same however many there are.
    """
    prompt, which = divmod(number, per_prompt)
    return (prompt, which) if which else (prompt,)


@torch.no_grad()
def _draw(gate: Gate, prompts: list[str], sources: list[torch.Generator], table: StepTable, guidance: float) -> Tensor:
    # Each source goes on to the noise of stochastic steps.
    noise = torch.stack([draw_normal(gate.latent_shape(), source) for source in sources]).to(gate.device)
    denoiser = gate.denoiser(gate.encode_text(prompts), guidance=guidance)
    return gate.decode(sample(denoiser, table, noise, sources)).float().cpu()


def generate(
    gate: Gate,
    prompts: Sequence[str],
    *,
    seed: int,
    table: StepTable,
    guidance: float,
    batch_size: int,
    per_prompt: int = 1,
    numbers: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Draw `per_prompt` pictures of each prompt, batch after batch.

    All randomness of a picture is at its `address`, i being the prompt's place in the list.

    Args:
        gate: the model, as `models.load_pipeline` gives it.
        prompts: N prompts.
        table: the sampler's steps, usually `evaluation_table`; a stochastic one will do as well.
        guidance: classifier-free guidance scale; 1 is none.
        numbers: which of the N x per_prompt pictures to draw; all, unless they are given.

    Yields:
        Numbers of b pictures and the pictures [b,3,H,W], float32 in [0, 1], on the CPU.

    Raises:
        ValueError: a batch size or a number of pictures below 1, or a picture with numbers that are not finite.
    """
    if batch_size < 1 or per_prompt < 1:
        raise ValueError(f"batch_size and pictures per prompt must be at least 1, not {batch_size} and {per_prompt}")
    wanted = list(range(len(prompts) * per_prompt)) if numbers is None else list(numbers)
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        sources = [generator(seed, PURPOSE, *address(number, per_prompt)) for number in part]
        images = _draw(gate, [prompts[number // per_prompt] for number in part], sources, table, guidance)
        for number, image in zip(part, images, strict=True):
            if not torch.isfinite(image).all():
                raise ValueError(f"the picture of prompt {number // per_prompt} is not finite: the model has diverged")
        yield part, images


def picture_path(folder: str | Path, number: int, per_prompt: int = 1) -> Path:
    """Where a picture lies, in GenEval's layout (Ghosh et al. 2023, arXiv 2310.11513): 00000/samples/0000.png.

    Numbers, never the prompt's own text, which may be hostile as a file name.
    """
    prompt, which = divmod(number, per_prompt)
    return Path(folder) / f"{prompt:05d}" / "samples" / f"{which:04d}.png"


def read_picture(folder: str | Path, number: int, per_prompt: int = 1) -> Tensor:
    """One saved picture [3,H,W] in [0, 1]. Raises ImageError (a ValueError) or FileNotFoundError naming the file."""
    path = picture_path(folder, number, per_prompt)
    try:
        image = decode_image(path.read_bytes())
    except ImageError as error:
        raise ImageError(f"{path} {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32) / 255


def read_pictures(folder: str | Path, n: int, batch_size: int = 64, per_prompt: int = 1) -> Iterator[Batch]:
    """The first n saved pictures in order, in the form in which `generate` yields them."""
    for start in range(0, n, batch_size):
        part = list(range(start, min(start + batch_size, n)))
        yield part, torch.stack([read_picture(folder, number, per_prompt) for number in part])


def table_digest(table: StepTable) -> str:
    """A short hash of the numbers that make two samplers the same."""
    parts = (table.timesteps, table.cx, table.c, table.std)
    return hashlib.blake2b(b"".join(p.double().cpu().numpy().tobytes() for p in parts), digest_size=8).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    """Write so that a file of this name is always a whole one, whenever the process is killed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # other processes may be writing the same
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
    per_prompt: int = 1,
    shard: tuple[int, int] = (0, 1),
    facts: Mapping[str, Any] | None = None,
    extras: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[list[int]]:
    """Generate into a folder in GenEval's layout, yielding the numbers just written; what is there already stays.

    `pictures.json` records seed, guidance, sampler, model and prompts; a folder made otherwise is refused, so a
    resumed run never mixes two models. `facts` joins that record: name the adapter there, for the gate's fingerprint
    knows files only. `extras` [N] joins each prompt's `metadata.jsonl`, where scorers look for tags. The list of
    prompts may grow or shrink at its end between runs. `shard` (i, n) draws prompts i, i + n, ... only: n processes,
    each with its own i, fill one folder without drawing a picture twice.

    Raises:
        ValueError: the folder holds other pictures, a shard that there is not, and as `generate`.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard {index} of {count}: shards are counted from 0")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = {"seed": seed, "guidance": float(guidance), "steps": len(table), "sampler": table_digest(table)}
    if per_prompt > 1:
        made["per_prompt"] = per_prompt
    _claim(folder, list(prompts), {**made, "model": gate.fingerprint(), **(facts or {})})
    _describe(folder, prompts, extras, range(index, len(prompts), count))
    missing = [
        number
        for number in range(len(prompts) * per_prompt)
        if number // per_prompt % count == index and not _is_whole(folder, number, per_prompt)
    ]
    for numbers, images in generate(
        gate, prompts,
        seed=seed, table=table, guidance=guidance, batch_size=batch_size, per_prompt=per_prompt, numbers=missing,
    ):  # fmt: skip
        for number, image in zip(numbers, images, strict=True):
            _replace(picture_path(folder, number, per_prompt), encode_png(image))
        yield numbers


def _describe(
    folder: Path, prompts: Sequence[str], extras: Sequence[Mapping[str, Any]] | None, places: Iterable[int]
) -> None:
    """Each prompt's folder, with the metadata.jsonl that GenEval's scorer and its like read."""
    for place in places:
        home = folder / f"{place:05d}"
        (home / "samples").mkdir(parents=True, exist_ok=True)
        line = json.dumps({**(extras[place] if extras else {}), "prompt": prompts[place]})
        if not (home / METADATA).is_file() or (home / METADATA).read_text(encoding="utf-8") != line + "\n":
            _replace(home / METADATA, f"{line}\n".encode())


def missing_pictures(folder: str | Path, n: int, per_prompt: int = 1) -> list[int]:
    """Which of the first n pictures are not there, or not whole."""
    return [number for number in range(n) if not _is_whole(Path(folder), number, per_prompt)]


def _is_whole(folder: Path, number: int, per_prompt: int) -> bool:
    try:
        read_picture(folder, number, per_prompt)
    except (ImageError, FileNotFoundError):
        return False
    return True
