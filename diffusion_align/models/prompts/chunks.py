"""Prompts as chunks of tokens, with weights, and the states of the chunks put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from .reading import DEFAULT, Reading
from .weighted import words_of

_BACKTRACK = 20  # A1111's default: a chunk ends at its last comma if that is at most so many tokens back
SMALLEST_MEAN = 1e-4  # of the states' root mean square

Chunk = list[tuple[int, float]]
"""Tokens of text with their weights, without begin and end of text."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """ids [B,n,L] int64 and weights [B,n,L] float32 of B prompts in n chunks of L tokens."""

    ids: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        if self.ids.ndim != 3 or self.ids.shape != self.weights.shape:
            raise ValueError(f"tokens are [B,n,L], not {list(self.ids.shape)} with weights {list(self.weights.shape)}")


def tokens_of(tokenizer: CLIPTokenizer, prompts: Sequence[str], reading: Reading = DEFAULT) -> Tokens:
    """The tokens of prompts, cut after `reading.chunks` chunks; raises ValueError as `words_of`."""
    if reading.syntax == "plain" and reading.chunks == 1:
        ids = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids[:, None]
        return Tokens(ids, torch.ones(ids.shape))
    rows = [chunks_of(tokenizer, prompt, reading.syntax)[: reading.chunks] for prompt in prompts]
    framed = [[_framed(tokenizer, chunk) for chunk in [*row, *[[]] * (reading.chunks - len(row))]] for row in rows]
    pairs = torch.tensor(framed, dtype=torch.float64)  # exact for ids
    return Tokens(pairs[..., 0].long(), pairs[..., 1].float())


def chunks_of(tokenizer: CLIPTokenizer, prompt: str, syntax: str) -> list[Chunk]:
    """All chunks of a prompt; an empty prompt has one, which is empty."""
    size = tokenizer.model_max_length - 2
    if syntax == "plain":
        ids = _ids(tokenizer, prompt)
        return [[(i, 1.0) for i in ids[first : first + size]] for first in range(0, len(ids), size)] or [[]]
    (comma,) = _ids(tokenizer, ",")
    chunks: list[Chunk] = [[]]
    commas = [0]  # where the last comma of each chunk ends; 0: it has none
    for part in words_of(prompt):
        if part is None:
            chunks.append([])
            commas.append(0)
            continue
        text, weight = part
        for i in _ids(tokenizer, text):
            if len(chunks[-1]) == size:
                end = commas[-1]
                moved = chunks[-1][end:] if i != comma and end and size - end < _BACKTRACK else []
                del chunks[-1][size - len(moved) :]
                chunks.append(moved)
                commas.append(0)
            chunks[-1].append((i, weight))
            if i == comma:
                commas[-1] = len(chunks[-1])
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def _ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def _framed(tokenizer: CLIPTokenizer, chunk: Chunk) -> Chunk:
    """The tokens with begin and end of text, padded to the tokenizer's length; all of these have weight 1."""
    begin, end, pad = (int(i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id))  # type: ignore[arg-type]
    framed = [(begin, 1.0), *chunk, (end, 1.0)]
    return framed + [(pad, 1.0)] * (tokenizer.model_max_length - len(framed))


def weighed(states: Tensor, weights: Tensor, keep_mean: bool) -> Tensor:
    """States [N,L,E] times weights [N,L]; with `keep_mean` each chunk keeps its mean, which is A1111's usual rule.

    Raises ValueError if the mean is so near 0 that keeping it would multiply the states by anything.
    """
    scaled = states * weights.to(states)[..., None]
    if not keep_mean:
        return scaled
    before, after = (x.mean((1, 2), keepdim=True) for x in (states, scaled))
    changed = (weights != 1).any(1).to(states.device)[:, None, None]
    if bool((changed & (after.abs() < SMALLEST_MEAN * scaled.square().mean((1, 2), keepdim=True).sqrt())).any()):
        raise ValueError(
            "the mean of this text encoder's states is nearly 0, so that words with weights cannot keep it: use "
            "--prompt_syntax a1111_no_norm"
        )
    return torch.where(changed, scaled * (before / after), states)


def joined(states: Tensor, chunks: int, reading: Reading) -> Tensor:
    """States [B*n,L,E] of n chunks each -> [B,n*L,E], or [B,n*(L-2)+2,E] with one begin and one end of text."""
    if chunks == 1:
        return states
    rows = states.unflatten(0, (-1, chunks))
    if reading.long_prompts != "chunk_kohya":
        return rows.flatten(1, 2)
    return torch.cat([rows[:, 0, :1], rows[:, :, 1:-1].flatten(1, 2), rows[:, -1, -1:]], 1)
