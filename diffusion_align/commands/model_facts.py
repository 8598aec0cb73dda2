"""What a model folder says about itself without being loaded: small JSON files and the headers of the weights."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.models.hub import asset

# models.adapters.TARGETS again: a plan is made without importing diffusers, and a test holds the two equal.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_REST = "proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut time_emb_proj".split()
LORA_LAYERS = {"attention": _ATTENTION, "wide": (*_ATTENTION, *_REST)}
# Stable Diffusion 1.x, where nothing is on this disk to be read; SDXL has the same latents at twice the side.
STABLE_DIFFUSION = {"channels": 4, "factor": 8, "resolution": 512}
STABLE_DIFFUSION_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class ModelFacts:
    """Latents are [channels, resolution / factor, resolution / factor]; `known` says whether a folder was read."""

    known: bool
    channels: int
    factor: int
    resolution: int
    scheduler: dict[str, Any]
    unet_shapes: dict[str, tuple[int, ...]]

    def latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        side = (resolution or self.resolution) // self.factor
        return self.channels, side, side

    def full_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.unet_shapes.values())

    def lora_parameters(self, rank: int, targets: str) -> int:
        """rank x (in + out) for each layer that gets a LoRA; `in` of a convolution counts its kernel's places."""
        ends = tuple(f".{layer}.weight" for layer in LORA_LAYERS[targets])
        return sum(rank * (s[0] + math.prod(s[1:])) for name, s in self.unet_shapes.items() if name.endswith(ends))


def read_model_facts(name: str) -> ModelFacts:
    """The facts of a model folder; those of Stable Diffusion 1.x, with `known` False, where there is no folder."""
    try:
        folder = asset("tiny") if name == "tiny" else Path(name).expanduser()
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        side = unet["sample_size"] * factor
        return ModelFacts(True, vae.get("latent_channels", 4), factor, side, scheduler, _shapes(folder / "unet"))
    except (OSError, ValueError, KeyError, TypeError):
        return ModelFacts(False, **STABLE_DIFFUSION, scheduler=STABLE_DIFFUSION_SCHEDULE, unet_shapes={})


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the headers of the safetensors files: eight bytes of length, then JSON."""
    shapes: dict[str, tuple[int, ...]] = {}
    # Variants (fp16) hold the same tensors again: one whole set is enough.
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    plain = [file for file in files if ".fp16" not in file.name and ".bf16" not in file.name]
    for file in plain or files:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 100_000_000)))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes
