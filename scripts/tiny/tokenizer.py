"""A CLIP tokenizer with the words of the caption grammar, and the byte alphabet for any other text."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from diffusion_align.shapes.caption import BACKGROUNDS, COLOURS, COUNT_WORDS, RELATIONS, SHAPES, SIZES

MAX_LENGTH = 24  # the longest caption has 16 tokens with begin and end


def build_tokenizer() -> CLIPTokenizer:
    """Every word of the grammar is one token; `<|endoftext|>` has the highest id, where CLIP pools."""
    plurals = [f"{shape}{'es' if shape == 'cross' else 's'}" for shape in SHAPES]
    relations = " ".join(RELATIONS).split()
    words = [*SIZES, *COLOURS, *SHAPES, *plurals, *relations, *BACKGROUNDS, *COUNT_WORDS.values(), "on", "background"]
    # Byte-pair merges are learnt, because hand-made ones interfere ("gr" of green breaks "background").
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sorted(set(words)), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *(c + "</w>" for c in alphabet), *("".join(merge) for merge in merges)])
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if split:
        raise ValueError(f"these words take more than one token: {split}")
    return tokenizer
