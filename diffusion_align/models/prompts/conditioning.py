"""What the network reads of a prompt, as one tensor: CLIP's hidden states and, for SDXL, an embedding and sizes.

Prompts are padded to the tokenizer's length, and truncated to it, as when these models were trained; `reading.py` says
what else can be asked for.

SDXL's UNet also takes a pooled embedding and six numbers of size (Podell et al. 2023, arXiv 2307.01952, section 2.2).
They are stored as two more rows of the text, because the levels above handle text as one `[B,L,E]`: caches store it,
caption dropout replaces it, guidance stacks it. So a dropped caption drops its pooled embedding too, and no caller
needs to know the kind of model.

    rows 0 .. L-3   hidden states of the two text encoders, side by side
    row  L-2        pooled embedding of the second encoder, then zeros
    row  L-1        original height, width; crop top, left; target height, width; in pixels; then zeros

A last row of zeros, the usual case, stands for the size of the picture at hand, not cropped. So the encoder need not
know the resolution. Zero is no picture's size, and is exact in every precision that a cache may have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from .chunks import Tokens, joined, tokens_of, weighed
from .reading import Reading

SIZES = 6


@dataclass(eq=False)
class SecondEncoder:
    """SDXL's second encoder. With `zero_empty`, guidance pushes away from zeros, not from an encoded empty prompt."""

    text_encoder: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    zero_empty: bool

    @property
    def pooled_width(self) -> int:
        return int(self.text_encoder.config.projection_dim)  # type: ignore[arg-type]


def last_states(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, prompts: list[str], chunk: int, how: Reading
) -> Tensor:
    """The last hidden states `[B,L,E]` float32, `chunk` prompts at a time: what Stable Diffusion 1.x/2.x reads."""
    tokens, states = tokens_of(tokenizer, prompts, how), []
    for ids in tokens.ids.flatten(0, 1).split(chunk):
        if how.clip_skip == 1:
            states.append(encoder(ids.to(encoder.device)).last_hidden_state.float())
        else:
            normed = getattr(encoder, "text_model", encoder).final_layer_norm(
                _states_at(encoder, ids, how.clip_skip)[0]
            )
            states.append(normed.float())
    return _put_together(torch.cat(states), tokens, how)


def penultimate_states(
    first: tuple[CLIPTokenizer, CLIPTextModel], second: SecondEncoder, prompts: list[str], chunk: int, how: Reading
) -> tuple[Tensor, Tensor]:
    """What SDXL reads, float32: the hidden states before the last layer of both encoders, side by side `[B,L,E]`, and
    the second encoder's projected embedding `[B,P]` (Podell et al. 2023, arXiv 2307.01952, section 2.1). Of several
    chunks the embedding is that of the first."""
    hidden, pooled = [], []
    encoders: tuple[tuple[CLIPTokenizer, PreTrainedModel], ...] = (first, (second.tokenizer, second.text_encoder))
    for tokenizer, encoder in encoders:
        tokens = tokens_of(tokenizer, prompts, how)
        found = [_states_at(encoder, ids, how.clip_skip + 1) for ids in tokens.ids.flatten(0, 1).split(chunk)]
        hidden.append(_put_together(torch.cat([states.float() for states, _ in found]), tokens, how))
        pooled = [output.text_embeds.float() for _, output in found if encoder is second.text_encoder]
    return torch.cat(hidden, -1), torch.cat(pooled)[:: how.chunks]


def _states_at(encoder: PreTrainedModel, ids: Tensor, back: int) -> tuple[Tensor, Any]:
    """The hidden states `back` layers from the end (1 is the last, before its norm), and all that came with them."""
    output: Any = encoder(ids.to(encoder.device), output_hidden_states=True)
    if back > len(output.hidden_states) - 1:
        raise ValueError(f"clip_skip skips all {len(output.hidden_states) - 1} layers of a text encoder")
    return output.hidden_states[-back], output


def _put_together(states: Tensor, tokens: Tokens, how: Reading) -> Tensor:
    if how.syntax != "plain":
        states = weighed(states, tokens.weights.flatten(0, 1), keep_mean=how.syntax == "a1111")
    return joined(states, tokens.ids.shape[1], how)


def pack(hidden: Tensor, pooled: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Hidden states [B,T,E], pooled embeddings [B,P] and the six sizes of all B prompts -> text [B,T+2,E].

    Raises ValueError for sizes that are no sizes, and for hidden states that are narrower than the embedding.
    """
    width = hidden.shape[-1]
    if max(pooled.shape[-1], SIZES) > width:
        raise ValueError(f"hidden states {width} wide have no room for a pooled embedding of {pooled.shape[-1]}")
    known = list(sizes or [0] * SIZES)
    if sizes is not None and (len(known) != SIZES or min(known) < 0 or 0 in (*known[:2], *known[4:])):
        raise ValueError(f"sizes are original height, width, crop top, left, target height, width; not {known}")
    ids = hidden.new_tensor(known).expand(len(hidden), -1)
    rows = [F.pad(row, (0, width - row.shape[-1]))[:, None] for row in (pooled.to(hidden), ids)]
    return torch.cat([hidden, *rows], 1)


def unpack(text: Tensor, pooled_width: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Text [B,T+2,E] -> hidden states [B,T,E], pooled embeddings [B,P] and sizes [B,6] float32.

    Texts without sizes get those of the picture at hand, `height` x `width` pixels.
    """
    sizes = text[:, -1, :SIZES].float()
    here = sizes.new_tensor([height, width, 0, 0, height, width])
    sizes = torch.where(_given(sizes), sizes, here)
    return text[:, :-2], text[:, -2, :pooled_width], sizes


def with_sizes_of(text: Tensor, negative: Tensor) -> Tensor:
    """The negative [1 or B,L,E] for each text [B,L,E], with the text's sizes where the negative has none.

    Guidance should push away from another prompt, not from another size; diffusers' pipelines default to the same.
    """
    negative = negative.to(text).expand_as(text)
    sizes = torch.where(_given(negative[:, -1]), negative[:, -1], text[:, -1])
    return torch.cat([negative[:, :-1], sizes[:, None]], 1)


def _given(sizes: Tensor) -> Tensor:
    return sizes.any(-1, keepdim=True)
