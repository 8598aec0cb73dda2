"""What a text-to-image model consists of, whatever files it was read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import CLIPTextModel, CLIPTokenizer

from .prompts.conditioning import SecondEncoder


@dataclass(eq=False)
class Components:
    """Networks on the CPU, tokenizers, and the scheduler's configuration. `second` is SDXL's second encoder."""

    unet: Any
    vae: Any
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: dict[str, Any]
    second: SecondEncoder | None = None
