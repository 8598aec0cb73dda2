"""The grammar: what it says can be read back, and the split holds out combinations."""

import itertools
from collections import Counter

import numpy as np
import pytest

from diffusion_align.shapes import Caption, Thing, held_out, parse, sample_captions
from diffusion_align.shapes.caption import BACKGROUNDS, KIND_SHARES, RELATIONS, random_caption


def test_captions_written_by_hand():
    caption = parse("a small red circle left of a large blue square on a gray background")
    assert caption == Caption(
        Thing("small", "red", "circle"), "gray", relation="left of", second=Thing("large", "blue", "square")
    )
    assert parse("three large green crosses on a white background") == Caption(
        Thing("large", "green", "cross"), "white", count=3
    )
    assert parse("a small cyan cross on a black background").kind == "single"


def test_every_sampled_caption_reads_back():
    captions = sample_captions(2000, 5) + sample_captions(500, 5, split="held-out")
    assert all(str(parse(text)) == text for text in captions)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a small red circle",
        "two small red circle on a gray background",
        "a small red circles on a gray background",
        "two small red circles left of a large blue square on a gray background",
        "a small red circle left of two large blue squares on a gray background",
        "a small red circle beside a large blue square on a gray background",
    ],
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(ValueError, match="not a caption"):
        parse(text)


def test_split_is_disjoint_in_combinations_whatever_relation_and_background():
    for text in sample_captions(300, 1, split="held-out"):
        caption = parse(text)
        if caption.relation:
            for relation, background in itertools.product(RELATIONS, BACKGROUNDS):
                assert held_out(Caption(caption.second, background, relation=relation, second=caption.first))
    train = {tuple(sorted(parse(t).things)) for t in sample_captions(3000, 2)}
    test = {tuple(sorted(parse(t).things)) for t in sample_captions(1000, 2, split="held-out")}
    assert not train & test


def test_share_of_held_out_combinations_and_kinds():
    rng = np.random.default_rng(0)
    captions = [random_caption(rng) for _ in range(8000)]
    assert (
        abs(np.mean([held_out(c) for c in captions]) - 1 / 8) < 0.06
    )  # only 48 single things exist, so the share is coarse
    kinds = Counter(c.kind for c in captions)
    assert all(abs(kinds[kind] / 8000 - share) < 0.02 for kind, share in KIND_SHARES.items())


def test_sampling_is_addressed_and_unique_on_request():
    assert sample_captions(50, 3) == sample_captions(50, 3) != sample_captions(50, 4)
    assert sample_captions(50, 3) == sample_captions(80, 3)[:50]
    captions = sample_captions(1500, 3, split="held-out", unique=True)
    assert len(set(captions)) == 1500
    with pytest.raises(ValueError, match="split"):
        sample_captions(3, 0, split="test")
