"""How many captions exceed the text encoders' token limit, beyond which training and sampling truncate them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from transformers import CLIPTokenizer

_CHUNK = 1024  # captions whose tokens are in memory together


def tokenizers_in(folder: Path) -> list[CLIPTokenizer]:
    """The tokenizers of a model folder, one or two, without the model. Raises FileNotFoundError where there is none."""
    places = [folder / name for name in ("tokenizer", "tokenizer_2") if (folder / name).is_dir()]
    if not places:
        raise FileNotFoundError(f"{folder}: holds no tokenizer; give a model folder in diffusers' format")
    return [CLIPTokenizer.from_pretrained(place) for place in places]


def cut_captions(tokenizers: Sequence[CLIPTokenizer], captions: Iterable[str]) -> tuple[int, int]:
    """How many captions some tokenizer truncates, and the limit in tokens, with those for begin and end of text."""
    limit = min(tokenizer.model_max_length for tokenizer in tokenizers)
    cut, waiting = 0, iter(captions)
    while chunk := list(islice(waiting, _CHUNK)):
        lengths = [
            [len(tokens) for tokens in tokenizer(chunk, truncation=False, verbose=False).input_ids]
            for tokenizer in tokenizers
        ]
        cut += sum(max(of_caption) > limit for of_caption in zip(*lengths, strict=True))
    return cut, limit
