"""What a model folder tells without loading the model: from its JSON files and the headers of its weights."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.models.hub import asset
from diffusion_align.models.single_file.architecture import architecture_of
from diffusion_align.models.single_file.contents import read_contents
from diffusion_align.models.single_file.names import UNET, diffusers_end
from diffusion_align.options.lora import target_layers
from diffusion_align.picture_size import require_multiples

# Assumed of a model that is not on this disk. SDXL has the betas of Stable Diffusion, and latents of twice the side.
STABLE_DIFFUSION, SDXL = "Stable Diffusion 1.5", "SDXL"
RESOLUTION = {STABLE_DIFFUSION: 512, SDXL: 1024}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SDXL_OF_512 = ("stabilityai/sdxl-turbo",)


@dataclass(frozen=True)
class ModelFacts:
    """Latents are [channels, height / factor, width / factor]. `known`: whether a folder was read. `family`:
    "SDXL" or "Stable Diffusion 1.5" (for all others)."""

    known: bool
    family: str
    channels: int
    factor: int
    resolution: int
    scheduler: dict[str, Any]
    unet_shapes: dict[str, tuple[int, ...]]
    unet: dict[str, Any]  # its config.json

    def latent_shape(self, resolution: int | str | None) -> tuple[int, int, int]:
        """Raises ValueError for a size that the VAE and the UNet cannot halve evenly, with the nearest possible."""
        levels = len(self.unet["block_out_channels"]) if "block_out_channels" in self.unet else 1
        width, height = require_multiples(resolution or self.resolution, self.factor * 2 ** (levels - 1))
        return self.channels, height // self.factor, width // self.factor

    def full_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.unet_shapes.values())

    def lora_parameters(self, rank: int, targets: str, dora: bool = False) -> int:
        """rank x (in + out) for each layer that gets a LoRA, where `in` of a convolution is channels x kernel size; for
        a DoRA `out` more."""
        ends = tuple(f".{layer}.weight" for layer in target_layers(targets))
        shapes = [shape for name, shape in self.unet_shapes.items() if f".{name}".endswith(ends)]
        return sum(rank * (s[0] + math.prod(s[1:])) + dora * s[0] for s in shapes)


def read_model_facts(name: str, prediction_type: str | None = None) -> ModelFacts:
    """The facts of a model's folder or file; if there is none, those of the family that the name suggests, with `known`
    False. `prediction_type` replaces the model's own.

    Raises:
        NotAModel: the file is no model, or does not tell what its network predicts.
    """
    folder = asset("tiny") if name == "tiny" else Path(name).expanduser()
    if folder.is_file():
        return _facts_of_file(folder, prediction_type)
    facts = _facts_of_folder(name, folder)
    given = {} if prediction_type is None else {"prediction_type": prediction_type}
    return dataclasses.replace(facts, scheduler=facts.scheduler | given)


def _facts_of_file(file: Path, prediction_type: str | None) -> ModelFacts:
    contents = read_contents(file)
    kind = architecture_of(contents)
    # The ends of the names, by which layers are chosen for a LoRA, as diffusers has them.
    shapes = {diffusers_end(key): entry.shape for key, entry in contents.entries.items() if key.startswith(UNET)}
    factor = kind.resolution // kind.unet["sample_size"]
    scheduler = kind.scheduler(prediction_type)
    family = SDXL if kind.text_encoder_2 is not None else STABLE_DIFFUSION
    return ModelFacts(True, family, kind.unet["in_channels"], factor, kind.resolution, scheduler, shapes, kind.unet)


def _facts_of_folder(name: str, folder: Path) -> ModelFacts:
    try:
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        family = SDXL if unet.get("addition_embed_type") == "text_time" else STABLE_DIFFUSION
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        side = unet["sample_size"] * factor
        channels, shapes = vae.get("latent_channels", 4), _shapes(folder / "unet")
        return ModelFacts(True, family, channels, factor, side, scheduler, shapes, unet)
    except (OSError, ValueError, KeyError, TypeError):
        # Models based on SDXL have these letters in their names: stable-diffusion-xl-base-1.0, RealVisXL_V4.0.
        family = SDXL if "xl" in name.rpartition("/")[2].lower() else STABLE_DIFFUSION
        resolution = 512 if name in SDXL_OF_512 else RESOLUTION[family]
        return ModelFacts(False, family, 4, 8, resolution, SCHEDULE, {}, {})


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the headers of the safetensors files: eight bytes of length, then JSON."""
    shapes: dict[str, tuple[int, ...]] = {}
    # Variants (fp16) hold the same tensors again, so they are read only if there is nothing else.
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    plain = [file for file in files if ".fp16" not in file.name and ".bf16" not in file.name]
    for file in plain or files:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 100_000_000)))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes
