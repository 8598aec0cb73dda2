"""Tiny models of two families, and the verdict on loading a LoRA file into them."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_align.models import TextToImage, add_lora, load_lora, load_pipeline
from diffusion_align.rng import normal
from diffusion_align.vocabulary import LORA_TARGETS
from stress.lora.faults import RANK

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Family:
    """A tiny model, an input, and the model's output for it without a LoRA."""

    name: str
    folder: Path
    model: TextToImage
    item: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    plain: torch.Tensor

    def fresh(self) -> TextToImage:
        model = copy.copy(self.model)
        model.unet = copy.deepcopy(self.model.unet)
        return model

    def answer(self, model: TextToImage) -> torch.Tensor:
        with torch.no_grad():
            return model.predict(*self.item)

    def tuned(self, seed: int, alpha: float, targets: str = "wide") -> TextToImage:
        model = self.fresh()
        for i, parameter in enumerate(add_lora(model.unet, RANK, alpha, LORA_TARGETS[targets])):
            parameter.data.add_(normal(parameter.shape, seed, "moved", i) * 0.1)
        return model


def families(folder: Path) -> list[Family]:
    """The tests' random tiny models, a Stable Diffusion and an SDXL."""
    from helpers_sdxl import make_tiny_sdxl_folder
    from helpers_tiny import make_tiny_folder

    made = {"SD": make_tiny_folder(folder / "sd"), "SDXL": make_tiny_sdxl_folder(folder / "sdxl")}
    return [family(name, model) for name, model in made.items()]


@torch.no_grad()
def family(name: str, folder: Path) -> Family:
    model = load_pipeline(folder, device="cpu")
    x, t = normal((2, *model.latent_shape()), 0, "x"), torch.tensor([20, 700])
    item = x, t, model.encode_text(["a red circle", "a blue square"])
    return Family(name, folder, model, item, model.predict(*item))


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collects the messages of loading a LoRA."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    log = logging.getLogger("diffusion_align.models.saved_weights")
    log.addHandler(handler)
    before, log.propagate = log.propagate, False
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.propagate = before


def verdict(family: Family, path: Path, due: torch.Tensor | None, names: set[str], **options: Any) -> str:
    """What became of a file: "refused" or "repaired" with a message that names one of `names`, "loaded" without a
    message, "unnamed", "wrong" (not the output `due`), or "changed" (refused, but the network was changed)."""
    model = family.fresh()
    with logged() as messages:
        try:
            load_lora(model, path, **options)
        except (ValueError, FileNotFoundError) as error:
            if not torch.equal(family.answer(model), family.plain) or hasattr(model.unet, "peft_config"):
                return "changed"
            return "refused" if any(name in str(error) for name in names) and "\n" not in str(error) else "unnamed"
    if due is None or not torch.allclose(family.answer(model), due, rtol=0, atol=TOLERANCE):
        return "wrong"
    if not messages:
        return "loaded"
    return "repaired" if len(messages) == 1 and any(name in messages[0] for name in names) else "unnamed"
