"""How many captions exceed the text encoders' token limit, beyond which training and sampling truncate them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from transformers import CLIPTokenizer

from ..single_file.architecture import architecture_of
from ..single_file.contents import read_contents
from ..single_file.tokenizer import tokenizers_of
from .chunks import chunks_of, tokens_of
from .reading import DEFAULT, Reading

_CHUNK = 1024  # captions whose tokens are in memory together


def tokenizers_in(folder: Path) -> list[CLIPTokenizer]:
    """The tokenizers of a model's folder or file, without the model. Raises FileNotFoundError where there is none."""
    if folder.is_file():
        return tokenizers_of(architecture_of(read_contents(folder)))
    places = [folder / name for name in ("tokenizer", "tokenizer_2") if (folder / name).is_dir()]
    if not places:
        raise FileNotFoundError(f"{folder}: holds no tokenizer; give a model folder in diffusers' format")
    return [CLIPTokenizer.from_pretrained(place) for place in places]


def cut_captions(
    tokenizers: Sequence[CLIPTokenizer], captions: Iterable[str], reading: Reading = DEFAULT
) -> tuple[int, int]:
    """How many captions some tokenizer truncates, and the limit in tokens, with those for begin and end of text.

    Raises ValueError for a caption with prompt syntax that has no single encoding.
    """
    limit = min(tokenizer.model_max_length for tokenizer in tokenizers)
    cut, waiting = 0, iter(captions)
    while chunk := list(islice(waiting, _CHUNK)):
        if reading.syntax == "plain":
            most = (limit - 2) * reading.chunks + 2
            lengths = [
                [len(tokens) for tokens in tokenizer(chunk, truncation=False, verbose=False).input_ids]
                for tokenizer in tokenizers
            ]
            cut += sum(max(of_caption) > most for of_caption in zip(*lengths, strict=True))
        else:
            rows = ([len(chunks_of(tokenizer, text, reading.syntax)) for tokenizer in tokenizers] for text in chunk)
            cut += sum(max(row) > reading.chunks for row in rows)
    return cut, limit * reading.chunks


def kept_tokens(tokenizers: Sequence[CLIPTokenizer], caption: str, reading: Reading = DEFAULT) -> bytes:
    """What the text encoders read of a caption, as bytes that are equal for captions that they cannot tell apart."""
    tokens = [tokens_of(tokenizer, [caption], reading) for tokenizer in tokenizers]
    return b"".join(some.ids.numpy().tobytes() + some.weights.numpy().tobytes() for some in tokens)
