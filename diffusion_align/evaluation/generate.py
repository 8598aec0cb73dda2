"""Pictures for evaluation: the same prompt and seed give the same picture, whatever the batch size and whichever model.

Base and tuned model therefore start every prompt from the same noise, and what differs between two pictures is the
model. Pictures are numbered through: number p of K pictures a prompt is picture p mod K of prompt p div K.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..prediction import Denoiser
from ..rng import draw_normal, generator
from ..samplers import StepTable, sample, step_table
from ..schedule import Schedule
from ..system.progress import counted
from .picture_folder import Batch, fill

PURPOSE = "evaluation"
Progress = Callable[[float], object]


class Model(Protocol):
    """What generation asks of a model; `models.TextToImage` has it."""

    @property
    def device(self) -> torch.device: ...
    def encode_text(self, prompts: list[str]) -> Tensor: ...
    def denoiser(self, text: Tensor, guidance: float = 1.0) -> Denoiser: ...
    def latent_shape(self, resolution: int | str | None = None) -> tuple[int, ...]: ...
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


@dataclass(frozen=True, eq=False)
class Drawing:
    """How pictures are drawn; everything but `batch_size` decides what they show.

    `table` holds the sampler's steps: usually `evaluation_table`, but it may be stochastic. A `guidance` of 1 is none.
    `resolution` is the side of a picture in pixels, or width x height; None is the model's own.
    """

    table: StepTable
    guidance: float
    seed: int
    batch_size: int
    per_prompt: int = 1
    resolution: int | str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.per_prompt < 1:
            counts = f"{self.batch_size} and {self.per_prompt}"
            raise ValueError(f"batch_size and pictures per prompt must be at least 1, not {counts}")


def address(number: int, per_prompt: int) -> tuple[int, ...]:
    """Where a picture's randomness lies, below (seed, "evaluation"): its prompt, and which of the prompt's pictures.

    The first picture of a prompt is the same however many there are.
    """
    prompt, which = divmod(number, per_prompt)
    return (prompt, which) if which else (prompt,)


@torch.no_grad()
def _draw(
    model: Model, prompts: list[str], sources: list[torch.Generator], drawing: Drawing, progress: Progress
) -> Tensor:  # fmt: skip
    # Each source goes on to the noise of stochastic steps.
    shape = model.latent_shape(drawing.resolution)
    noise = torch.stack([draw_normal(shape, source) for source in sources]).to(model.device)
    denoiser = model.denoiser(model.encode_text(prompts), guidance=drawing.guidance)
    denoiser = counted(denoiser, partial(progress, len(prompts) / len(drawing.table)))
    return model.decode(sample(denoiser, drawing.table, noise, sources)).float().cpu()


def generate(
    model: Model,
    prompts: Sequence[str],
    drawing: Drawing,
    *,
    numbers: Sequence[int] | None = None,
    progress: Progress = lambda pictures: None,
) -> Iterator[Batch]:
    """Draw `drawing.per_prompt` pictures of each prompt, batch after batch.

    All randomness of a picture is at its `address`, i being the prompt's place in the list.

    Args:
        model: the model, as `models.load_pipeline` gives it.
        prompts: N prompts.
        numbers: which of the N x per_prompt pictures to draw; all, unless they are given.
        progress: called after every step of the sampler with its worth in pictures, such as 8 / 25: a bar's `update`.

    Yields:
        Numbers of b pictures and the pictures [b,3,H,W], float32 in [0, 1], on the CPU.

    Raises:
        ValueError: a picture with numbers that are not finite.
    """
    wanted = list(range(len(prompts) * drawing.per_prompt)) if numbers is None else list(numbers)
    for start in range(0, len(wanted), drawing.batch_size):
        chunk = wanted[start : start + drawing.batch_size]
        sources = [generator(drawing.seed, PURPOSE, *address(number, drawing.per_prompt)) for number in chunk]
        images = _draw(model, [prompts[number // drawing.per_prompt] for number in chunk], sources, drawing, progress)
        for number, image in zip(chunk, images, strict=True):
            require_finite(image, number // drawing.per_prompt)
        yield chunk, images


def require_finite(image: Tensor, prompt: int) -> None:
    """Raise ValueError for a picture with numbers that are not finite; as a file it would be black."""
    if not torch.isfinite(image).all():
        raise ValueError(
            f"the picture of prompt {prompt} is not finite: the weights, or a LoRA on them, are broken, have "
            "diverged, or overflow in this precision"
        )


def table_digest(table: StepTable) -> str:
    """A short hash of the numbers that make two samplers the same."""
    parts = (table.timesteps, table.cx, table.c, table.std)
    return hashlib.blake2b(b"".join(p.cpu().double().numpy().tobytes() for p in parts), digest_size=8).hexdigest()


def save_pictures(
    model: Model,
    prompts: Sequence[str],
    folder: str | Path,
    drawing: Drawing,
    *,
    shard: tuple[int, int] = (0, 1),
    facts: Mapping[str, Any] | None = None,
    extras: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress = lambda pictures: None,
) -> Iterator[list[int]]:
    """Generate into a folder in GenEval's layout; see `fill` for what resumes, `extras` and `shard`.

    Written down are seed, guidance, sampler, model, prompts and a resolution that is given. `facts` joins them: name
    the LoRA there, for the model's fingerprint knows files only. `progress` is called as in `generate`.

    Raises:
        ValueError: the folder holds other pictures, there is no such shard, and as `generate`.
    """
    made = {"seed": drawing.seed, "guidance": float(drawing.guidance), "steps": len(drawing.table)}
    made |= {"sampler": table_digest(drawing.table), "model": model.fingerprint()}
    made |= {"resolution": drawing.resolution} if drawing.resolution is not None else {}

    def draw(numbers: list[int]) -> Iterator[Batch]:
        return generate(model, prompts, drawing, numbers=numbers, progress=progress)

    yield from fill(
        folder, prompts, draw, {**made, **(facts or {})}, per_prompt=drawing.per_prompt, shard=shard, extras=extras
    )
