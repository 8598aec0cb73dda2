"""The caption grammar of the embedded world, and its split into training and held-out combinations.

a small red circle on a gray background
three large blue squares on a white background
a small red circle left of a large blue square on a black background
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass

import numpy as np

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("black", "gray", "white")
COUNT_WORDS = {1: "a", 2: "two", 3: "three"}

# One of eight combinations of things is held out: no training caption contains it.
HELD_OUT_ONE_IN = 8
KIND_SHARES = {"single": 0.3, "count": 0.2, "pair": 0.5}


@dataclass(frozen=True, order=True)
class Thing:
    """One kind of object: a size, a colour and a shape."""

    size: str
    colour: str
    shape: str

    def words(self, count: int = 1) -> str:
        plural = "" if count == 1 else "es" if self.shape == "cross" else "s"
        return f"{COUNT_WORDS[count]} {self.size} {self.colour} {self.shape}{plural}"


@dataclass(frozen=True)
class Caption:
    """A caption as data: `count` copies of `first`, or one `first` in a `relation` to one `second`."""

    first: Thing
    background: str
    count: int = 1
    relation: str | None = None
    second: Thing | None = None

    @property
    def kind(self) -> str:
        return "pair" if self.relation else "single" if self.count == 1 else "count"

    @property
    def things(self) -> tuple[Thing, ...]:
        """Every object that the picture must show, in the caption's order."""
        return (self.first, self.second) if self.second else (self.first,) * self.count

    def __str__(self) -> str:
        relation = f" {self.relation} {self.second.words()}" if self.second else ""
        return f"{self.first.words(self.count)}{relation} on a {self.background} background"


ALL_THINGS = tuple(Thing(*words) for words in itertools.product(SIZES, COLOURS, SHAPES))

_THING = rf"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PATTERN = re.compile(
    rf"({'|'.join(COUNT_WORDS.values())}) {_THING}(?:e?s)?"
    rf"(?: ({'|'.join(RELATIONS)}) a {_THING})? on a ({'|'.join(BACKGROUNDS)}) background"
)


def parse(text: str) -> Caption:
    """Parse a caption; `str(parse(text)) == text` for every caption of the grammar.

    Raises:
        ValueError: the text is not a caption of this grammar.
    """
    match = _PATTERN.fullmatch(text.strip())
    caption = None
    if match:
        count_word, *first, relation, size, colour, shape, background = match.groups()
        count = next(number for number, word in COUNT_WORDS.items() if word == count_word)
        second = Thing(size, colour, shape) if relation else None
        caption = Caption(Thing(*first), background, count, relation, second)
    # Relations are between single things, and plurals must agree with their number.
    if caption is None or (caption.relation and caption.count != 1) or str(caption) != text.strip():
        raise ValueError(f"not a caption of the embedded world: {text!r} (example: {EXAMPLE!s})")
    return caption


def held_out(caption: Caption) -> bool:
    """Whether the caption's combination of things is reserved for evaluation.

    The combination is the kind, the count and the unordered things, without relation and background, so the composition
    of a held-out prompt is new, not only its text.
    """
    key = f"{caption.kind} {caption.count} {sorted(caption.things)}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def random_caption(rng: np.random.Generator) -> Caption:
    """One caption: kinds by KIND_SHARES, the rest uniform; the things of a pair differ in colour or shape."""
    kind = rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values()))
    first = ALL_THINGS[rng.integers(len(ALL_THINGS))]
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    if kind == "count":
        return Caption(first, background, count=int(rng.integers(2, 4)))
    if kind == "single":
        return Caption(first, background)
    second = first
    while (second.colour, second.shape) == (first.colour, first.shape):
        second = ALL_THINGS[rng.integers(len(ALL_THINGS))]
    return Caption(first, background, relation=RELATIONS[rng.integers(len(RELATIONS))], second=second)


def sample_captions(n: int, seed: int, *, split: str = "train", unique: bool = False) -> list[str]:
    """`n` captions of one split ("train" or "held-out"), the same for the same arguments.

    Raises:
        ValueError: an unknown split.
    """
    if split not in ("train", "held-out"):
        raise ValueError(f'split must be "train" or "held-out", not {split!r}')
    rng = np.random.default_rng([seed, len(split)])
    captions: list[str] = []
    seen: set[str] = set()
    while len(captions) < n:
        caption = random_caption(rng)
        text = str(caption)
        if held_out(caption) == (split == "held-out") and not (unique and text in seen):
            captions.append(text)
            seen.add(text)
    return captions


EXAMPLE = Caption(Thing("small", "red", "circle"), "gray", relation="left of", second=Thing("large", "blue", "square"))
