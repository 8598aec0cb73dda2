"""The gate: a Stable-Diffusion-format folder in, and out come text and picture encoders and denoisers as plain
functions.

Between floors pictures are float32 `[B,3,H,W]` in [0, 1], and latents are float32 and already times the VAE's scaling
factor.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..prediction import Denoiser, to_clean
from ..schedule import Schedule
from .guidance import guided
from .hub import locate

WEIGHT_FILES = ("*.safetensors", "*.bin")


@dataclass(eq=False)
class TextToImage:
    """A text-to-image model. `source` is where it came from; `dtype` the precision of its frozen weights."""

    unet: UNet2DConditionModel
    vae: Any  # an AutoencoderKL; its annotations ask for tensor subclasses that do not exist at run time
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: Schedule
    folder: Path
    source: str
    device: torch.device
    dtype: torch.dtype

    @property
    def prediction_type(self) -> str:
        """What the network puts out: "epsilon", "sample" or "v_prediction"."""
        return self.schedule.prediction_type

    @property
    def resolution(self) -> int:
        """Pixels on a side of the model's own pictures, e.g. 512."""
        return int(_config(self.unet, "sample_size")) * self._factor

    @property
    def _factor(self) -> int:
        return 2 ** (len(_config(self.vae, "block_out_channels")) - 1)

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C,h,w) of the latents of square pictures. Raises ValueError for a size the VAE cannot halve often enough."""
        pixels = self.resolution if resolution is None else resolution
        if pixels <= 0 or pixels % self._factor:
            raise ValueError(f"resolution {pixels} is not a positive multiple of {self._factor}, the VAE's reduction")
        side = pixels // self._factor
        return int(_config(self.unet, "in_channels")), side, side

    @torch.no_grad()
    def encode_text(self, prompts: list[str], chunk: int = 64) -> Tensor:
        """The text encoder's last hidden states, `[B,L,E]` float32, padded to the tokenizer's length as in training."""
        if not prompts:
            return self.empty_text[:0]
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        parts = [self.text_encoder(part.to(self.device)).last_hidden_state.float() for part in tokens.split(chunk)]
        return torch.cat(parts)

    @cached_property
    def empty_text(self) -> Tensor:
        """`[1,L,E]` float32: the encoding of the empty prompt."""
        return self.encode_text([""])

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor | None = None, chunk: int = 16) -> Tensor:
        """Latents `[B,C,h,w]` float32 of pictures `[B,3,H,W]` in [0, 1].

        `noise [B,C,h,w]` picks the sample of the VAE's posterior, so randomness stays with the caller; None takes its
        mean.

        Raises:
            ValueError: pictures or noise of another shape, or pictures that are not in [0, 1] (bytes, or -1 .. 1).
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"pictures are floats [B,3,H,W], not {images.dtype} {list(images.shape)}")
        side = [size // self._factor for size in images.shape[2:]]
        if noise is not None and list(noise.shape) != [len(images), self.latent_shape()[0], *side]:
            raise ValueError(f"noise is {list(noise.shape)} for pictures {list(images.shape)}")
        if len(images) and not 0 <= float(images.min()) <= float(images.max()) <= 1:
            raise ValueError(f"pictures are in [0, 1], not {float(images.min()):.3g} .. {float(images.max()):.3g}")
        parts = []
        for i in range(0, len(images), chunk):
            pixels = images[i : i + chunk].to(self.device, self.vae.dtype) * 2 - 1
            posterior = self.vae.encode(pixels, return_dict=False)[0]
            z = posterior.mean.float()
            if noise is not None:
                z = z + posterior.std.float() * noise[i : i + chunk].to(z)
            parts.append(z)
        return (torch.cat(parts) - self._shift) * float(_config(self.vae, "scaling_factor"))

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = 16) -> Tensor:
        """Pictures `[B,3,H,W]` float32 in [0, 1] of latents `[B,C,h,w]`."""
        z = latents.to(self.device) / float(_config(self.vae, "scaling_factor")) + self._shift
        parts = [self.vae.decode(part.to(self.vae.dtype), return_dict=False)[0].float() for part in z.split(chunk)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    @property
    def _shift(self) -> float:
        return float(self.vae.config.get("shift_factor") or 0.0)

    def predict(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The network's output `[B,C,h,w]`, float32, at states `x`, times `t [B]` and text `[B,L,E]`;
        differentiable."""
        x, text = x.to(self.device, self.dtype), text.to(self.device, self.dtype)
        return self.unet(x, t.to(self.device, torch.float32), text, return_dict=False)[0].float()

    def denoiser(self, text: Tensor, guidance: float = 1.0, negative: Tensor | None = None) -> Denoiser:
        """Bind a prompt: the clean prediction `(x [B,...], t [B]) -> x0 [B,...]` in float32, with classifier-free
        guidance.

        `negative` is [B,L,E] or [1,L,E], by default the empty prompt. At guidance 1 it is not computed.
        """
        text = text.to(self.device)
        without = self.empty_text if negative is None else negative

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            output = guided(self.predict, x, t, text, without, guidance)
            alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
            return to_clean(output, x, alpha, sigma, self.prediction_type)

        return denoise

    def fingerprint(self) -> str:
        """Identifies the weights the gate was loaded from: the key of caches, and part of a run's identity on
        resume."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            for path in sorted((self.folder / part).rglob("*")):
                if path.is_file() and (path.suffix == ".json" or any(path.match(kind) for kind in WEIGHT_FILES)):
                    digest.update(f"{part}/{path.name} {path.stat().st_size}\n".encode())
                    with path.open("rb") as file:  # all of it: a sample would miss a merge into a few layers
                        digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def load_pipeline(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> TextToImage:
    """Load a Stable Diffusion 1.x or 2.x format model: a folder, a hub id, or "tiny", the embedded one.

    All parts come in `dtype` whatever precision they are stored in, in eval mode, without gradients. `device` is CUDA
    if there is one, else the CPU.

    Raises:
        FileNotFoundError: nothing there, or a part of it missing.
        ValueError: not a Stable Diffusion 1.x/2.x model, or a damaged part.
    """
    folder = locate(name_or_path, revision=revision, variant=variant)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    scheduler = _part(folder / "scheduler", lambda p: json.loads((p / "scheduler_config.json").read_text()))
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    networks: dict[str, Any] = {
        name: _part(folder / name, partial(_whole, kind, dtype, variant)) for name, kind in kinds.items()
    }
    taken, given = networks["unet"].config["in_channels"], networks["vae"].config["latent_channels"]
    if taken != given:
        raise ValueError(
            f"{folder / 'unet'} takes {taken} channels and the VAE makes {given}: "
            "an inpainting or depth model, which is not supported; use its text-to-image base"
        )
    for network in networks.values():
        network.to(where).eval().requires_grad_(False)
    return TextToImage(
        **networks,
        tokenizer=_part(folder / "tokenizer", CLIPTokenizer.from_pretrained),
        schedule=Schedule.from_config(scheduler),
        folder=folder,
        source=os.fspath(name_or_path),
        device=where,
        dtype=dtype,
    )


def _whole(kind: Any, dtype: torch.dtype, variant: str | None, folder: Path) -> Any:
    """A network with all its weights from the file: the loaders fill gaps at random, or with nothing, and only warn."""
    with torch.random.fork_rng(devices=[]):
        network, info = kind.from_pretrained(
            folder, torch_dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True
        )
    if gaps := sorted(info["missing_keys"]):
        raise ValueError(f"{len(gaps)} weights are missing, the first is {gaps[0]}")
    return network


def _part(folder: Path, load: Any) -> Any:
    """Load one component; whatever goes wrong is told in one line that names its folder."""
    try:
        return load(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is incomplete: {_first_line(error)}; fetch the model again") from error
    except Exception as error:  # damaged weights raise a dozen kinds, from safetensors, torch, json and the loaders
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{folder} could not be loaded: {_first_line(error)}; fetch the model again") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _config(network: Any, key: str) -> Any:
    """A network's setting; accelerate's and torch's wrappers for several devices have it under `module`."""
    return getattr(network, "module", network).config[key]
