"""CLIP's tokenizer without a download: the vocabulary comes with the package open_clip."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from .architecture import Architecture
from .kinds import SD2

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
BYTES, TOKENS = 256, 49408
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(length: int, pad_with_zero: bool) -> CLIPTokenizer:
    """The tokenizer of every CLIP text encoder. OpenCLIP's models pad with token 0 ("!"), the first CLIP with its end
    of text.

    As in the published folders, the token that pads is read as itself in a prompt too: "!" is 0 there, not 256.
    """
    vocabulary, merges = _vocabulary()
    given: Any = merges  # pairs, which the annotation of transformers leaves out
    pad = "!" if pad_with_zero else END
    return CLIPTokenizer(vocab=vocabulary, merges=given, pad_token=pad, model_max_length=length)


def tokenizers_of(kind: Architecture) -> list[CLIPTokenizer]:
    """The tokenizers of a single-file model: one, or two for SDXL."""
    first = clip_tokenizer(kind.text_encoder["max_position_embeddings"], pad_with_zero=kind.family == SD2)
    if kind.text_encoder_2 is None:
        return [first]
    return [first, clip_tokenizer(kind.text_encoder_2["max_position_embeddings"], pad_with_zero=True)]


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens with their numbers, and the merges: single bytes, the same at the end of a word, merged pairs, marks."""
    package = find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("the package open_clip_torch, which holds CLIP's vocabulary, is not installed")
    with gzip.open(Path(package.submodule_search_locations[0]) / VOCABULARY, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : TOKENS - 2 * BYTES - 2 + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    characters = _byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *(left + right for left, right in merges), START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _byte_characters() -> list[str]:
    """A printable character for each of 256 bytes, in CLIP's order: printable bytes first, then the others from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(BYTES + i) for i in range(BYTES - len(printable))]
