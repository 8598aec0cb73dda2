"""Prompts through CLIP's text encoders, padded to the tokenizer's length and cut off beyond it, as in training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel


@dataclass(eq=False)
class SecondEncoder:
    """What SDXL has besides. With `zero_empty` guidance pushes away from zeros and not from an encoded empty prompt."""

    text_encoder: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    zero_empty: bool

    @property
    def pooled_width(self) -> int:
        return int(self.text_encoder.config.projection_dim)  # type: ignore[arg-type]


def last_states(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, prompts: list[str], chunk: int) -> Tensor:
    """The last hidden states `[B,L,E]` float32, `chunk` prompts at a time: what Stable Diffusion 1.x/2.x reads."""
    parts = [encoder(tokens).last_hidden_state.float() for tokens in _tokens(tokenizer, prompts, chunk, encoder)]
    return torch.cat(parts)


def penultimate_states(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, second: SecondEncoder, prompts: list[str], chunk: int
) -> tuple[Tensor, Tensor]:
    """Hidden states before the last layer of both encoders, side by side `[B,L,E]`, and the second's projected
    embedding `[B,P]`; float32. What SDXL reads (Podell et al. 2023, arXiv 2307.01952, section 2.1)."""
    hidden, pooled = [], []
    for first_tokens, second_tokens in zip(
        _tokens(tokenizer, prompts, chunk, encoder),
        _tokens(second.tokenizer, prompts, chunk, second.text_encoder),
        strict=True,
    ):
        one = encoder(first_tokens, output_hidden_states=True)
        two = second.text_encoder(second_tokens, output_hidden_states=True)
        hidden.append(torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1).float())
        pooled.append(two.text_embeds.float())
    return torch.cat(hidden), torch.cat(pooled)


def _tokens(tokenizer: CLIPTokenizer, prompts: list[str], chunk: int, encoder: PreTrainedModel) -> list[Tensor]:
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return [part.to(encoder.device) for part in tokens.split(chunk)]
