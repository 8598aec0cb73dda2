"""A text-to-image model whose encoders, decoder and denoisers are plain functions, for every model family.

Between levels pictures are float32 `[B,3,H,W]` in [0, 1], and latents are float32 and already times the VAE's scaling
factor. Text is one tensor `[B,L,E]`; `conditioning` describes what SDXL adds to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..picture_size import require_multiples
from ..prediction import Denoiser
from ..schedule import Schedule
from ..system.memory import in_parts
from .guidance import guided_denoiser
from .hub import files_digest, model_digest
from .prompts.conditioning import SecondEncoder, last_states, pack, penultimate_states, unpack, with_sizes_of
from .prompts.reading import DEFAULT, Reading
from .prompts.token_limit import cut_captions


@dataclass(eq=False)
class TextToImage:
    """A text-to-image model: SDXL's format with a `second` encoder, else Stable Diffusion 1.x/2.x's.

    `source` is the name that it was loaded by, `dtype` the precision of its frozen weights, `merged` the digests of the
    adapters that were merged into its weights.
    """

    unet: UNet2DConditionModel
    vae: Any  # an AutoencoderKL; its annotations ask for tensor subclasses that do not exist at run time
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: Schedule
    folder: Path
    source: str
    device: torch.device
    dtype: torch.dtype
    second: SecondEncoder | None = None
    reading: Reading = DEFAULT  # set it before anything is encoded
    merged: tuple[str, ...] = ()
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # a scheduler_config.json, of which `schedule` is made
    other_vae: Path | None = None  # the files of a VAE that is not the model's own
    other_prediction_type: str | None = None  # given in place of what the scheduler's file says

    @property
    def prediction_type(self) -> str:
        """What the network puts out: "epsilon", "sample" or "v_prediction"."""
        return self.schedule.prediction_type

    @property
    def resolution(self) -> int:
        """Pixels on a side of the model's own pictures, e.g. 512."""
        return int(_config(self.unet)["sample_size"]) * self._factor

    @property
    def _factor(self) -> int:
        return 2 ** (len(_config(self.vae)["block_out_channels"]) - 1)

    @property
    def size_step(self) -> int:
        """Sides of pictures are multiples of this: the VAE reduces them, and the UNet halves them at each level."""
        return self._factor * 2 ** (len(_config(self.unet)["block_out_channels"]) - 1)

    def latent_shape(self, resolution: int | str | None = None) -> tuple[int, int, int]:
        """(C,h,w) of the latents of pictures. Raises ValueError for a size that the VAE and the UNet cannot halve
        evenly, with the nearest that they can."""
        width, height = require_multiples(self.resolution if resolution is None else resolution, self.size_step)
        return int(_config(self.unet)["in_channels"]), height // self._factor, width // self._factor

    @torch.no_grad()
    def encode_text(self, prompts: list[str], chunk: int = 64, *, sizes: Sequence[int] | None = None) -> Tensor:
        """What the network reads of prompts, `[B,L,E]` float32: the text encoder's last hidden states, or for SDXL what
        `conditioning` describes. An empty prompt is encoded like any other.

        `sizes` are SDXL's original height, width, crop top, left, target height, width; the default is each picture's
        own size.

        Raises:
            ValueError: sizes for a model that takes none, or sizes that cannot be; prompts that `reading` cannot read.
        """
        if not prompts:
            return self.encode_text([""])[:0]
        if self.second is None:
            if sizes is not None:
                raise ValueError(f"{self.source} takes no size of pictures: leave out sizes")
            return last_states(self.tokenizer, self.text_encoder, prompts, chunk, self.reading)
        first = (self.tokenizer, self.text_encoder)
        hidden, pooled = penultimate_states(first, self.second, prompts, chunk, self.reading)
        return pack(hidden, pooled, sizes)

    @cached_property
    def empty_text(self) -> Tensor:
        """`[1,L,E]` float32: what guidance pushes away from without a negative prompt, as in diffusers' pipelines.

        It is the encoding of the empty prompt, or zeros for an SDXL whose model_index.json says so.
        """
        encoded = self.encode_text([""])
        return torch.zeros_like(encoded) if self.second is not None and self.second.zero_empty else encoded

    def forget_texts(self) -> None:
        """Encode the empty prompt again when it is needed next, as the text encoders have changed."""
        self.__dict__.pop("empty_text", None)

    def cut_captions(self, prompts: Sequence[str]) -> tuple[int, int]:
        """How many prompts exceed the text encoders' limit, and that limit in tokens."""
        return cut_captions(self.tokenizers, prompts, self.reading)

    @property
    def tokenizers(self) -> list[CLIPTokenizer]:
        """One, or SDXL's two."""
        return [self.tokenizer, *([self.second.tokenizer] if self.second else [])]

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor | None = None, chunk: int = 16) -> Tensor:
        """Latents `[B,C,h,w]` float32 of pictures `[B,3,H,W]` in [0, 1].

        `noise [B,C,h,w]` selects the sample of the VAE's posterior, so the caller controls randomness; None takes the
        mean.

        Raises:
            ValueError: pictures or noise of another shape, or pictures that are not in [0, 1] (bytes, or -1 .. 1).
            OutOfMemory: one picture does not fit; before that, the chunk is halved.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"pictures are floats [B,3,H,W], not {images.dtype} {list(images.shape)}")
        side = [size // self._factor for size in images.shape[2:]]
        if noise is not None and list(noise.shape) != [len(images), self.latent_shape()[0], *side]:
            raise ValueError(f"noise is {list(noise.shape)} for pictures {list(images.shape)}")
        if len(images) and not 0 <= float(images.min()) <= float(images.max()) <= 1:
            raise ValueError(f"pictures are in [0, 1], not {float(images.min()):.3g} .. {float(images.max()):.3g}")
        shift, scale = self._latent_scale()

        def encode(rows: slice) -> Tensor:
            pixels = images[rows].to(self.device, self.vae.dtype) * 2 - 1
            with self._vae_precision():
                posterior = self.vae.encode(pixels, return_dict=False)[0]
            z = posterior.mean.float()
            return z if noise is None else z + posterior.std.float() * noise[rows].to(z)

        return (torch.cat(in_parts(encode, len(images), chunk, "encoding pictures")[0]) - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = 16) -> Tensor:
        """Pictures `[B,3,H,W]` float32 in [0, 1] of latents `[B,C,h,w]`."""
        shift, scale = self._latent_scale()
        z = latents.to(self.device) / scale + shift

        def decode(rows: slice) -> Tensor:
            with self._vae_precision():
                return self.vae.decode(z[rows].to(self.vae.dtype), return_dict=False)[0].float()

        return (torch.cat(in_parts(decode, len(z), chunk, "decoding latents")[0]) / 2 + 0.5).clamp(0, 1)

    def _latent_scale(self) -> tuple[Any, Any]:
        """(shift, scale) where latents are (z - shift) scale of the VAE's z.

        Per channel for an SDXL VAE that names means and deviations, which diffusers reads of no other family.
        """
        config, scale = _config(self.vae), float(_config(self.vae)["scaling_factor"])
        means, stds = config.get("latents_mean"), config.get("latents_std")
        if self.second is None or means is None or stds is None:
            return float(config.get("shift_factor") or 0.0), scale
        per_channel = torch.tensor([means, stds], device=self.device)[..., None, None]
        return per_channel[0], scale / per_channel[1]

    def _vae_precision(self) -> AbstractContextManager[Any]:
        """SDXL's own VAE overflows in float16, so `load_pipeline` keeps its weights in float32; autocast must not undo
        that."""
        kind = self.device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        fragile = self.second is not None and _config(self.vae)["force_upcast"]
        return torch.autocast(kind, enabled=False) if half and fragile else nullcontext()

    def predict(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The network's output `[B,C,h,w]` float32 at states `x`, times `t [B]` and text `[B,L,E]`; differentiable."""
        x, t, text = x.to(self.device, self.dtype), t.to(self.device, torch.float32), text.to(self.device)
        if self.second is None:
            return self.unet(x, t, text.to(self.dtype), return_dict=False)[0].float()
        height, width = (side * self._factor for side in x.shape[2:])
        hidden, pooled, sizes = unpack(text, self.second.pooled_width, height, width)
        # The sizes stay in float32: bfloat16 would round 1000 pixels to a multiple of 4.
        added = {"text_embeds": pooled.to(self.dtype), "time_ids": sizes}
        return self.unet(x, t, hidden.to(self.dtype), added_cond_kwargs=added, return_dict=False)[0].float()

    def denoiser(self, text: Tensor, guidance: float = 1.0, negative: Tensor | None = None) -> Denoiser:
        """The denoiser of a prompt, `(x [B,...], t [B]) -> x0 [B,...]` in float32, with classifier-free guidance.

        `negative` is [B,L,E] or [1,L,E], by default the empty prompt; it takes the text's sizes unless it has its own.
        At guidance 1 it is not computed.
        """
        text = text.to(self.device)
        without = self.empty_text if negative is None else negative
        if self.second is not None:
            without = with_sizes_of(text, without)
        return guided_denoiser(self.predict, text, without, guidance, self.schedule, self.prediction_type)

    def fingerprint(self) -> str:
        """A digest of the files that the model was loaded from, for the keys of caches and a run's identity. It names
        what was merged into the weights, and how prompts are read if that is not the usual way."""
        weights = "+".join([self._fingerprint, *self.merged])
        return weights if self.reading == DEFAULT else f"{weights}, prompts: {self.reading}"

    @cached_property
    def _fingerprint(self) -> str:
        digest = model_digest(self.folder)
        if self.other_vae is not None:
            digest += f", vae: {files_digest(self.other_vae)}"
        return digest + (f", predicts {self.other_prediction_type}" if self.other_prediction_type else "")


def _config(network: Any) -> Any:
    """A network's settings; the wrappers of accelerate and torch for several devices hold it as `module`."""
    return getattr(network, "module", network).config
