"""The judge against pictures whose truth is known because we drew them, and against pictures spoiled on purpose."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from tiny.pictures import to_tensor
from tiny.reward import wrong_caption

from diffusion_align.shapes import ATTRIBUTES, Caption, Thing, judge, parse, read_picture, render, sample_captions
from diffusion_align.shapes.caption import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES
from diffusion_align.shapes.render import PALETTE

N = 600


@pytest.fixture(scope="module")
def drawn():
    captions = sample_captions(N // 2, 21) + sample_captions(N // 2, 21, split="held-out")
    return captions, [render(parse(c), [21, i]) for i, c in enumerate(captions)]


def accuracy(pictures, captions):
    return {name: marks.nanmean().item() for name, marks in judge(to_tensor(pictures), captions).items()}


def test_rendered_pictures_are_read_right(drawn):
    captions, pictures = drawn
    assert min(accuracy(pictures, captions).values()) >= 0.995


def test_objects_and_places_are_read_off_a_picture_painted_by_hand():
    picture = np.full((64, 64, 3), PALETTE["gray"], np.uint8)
    picture[10:22, 5:17] = PALETTE["red"]  # a 12-pixel square, centre (10.5, 15.5)
    picture[30:54, 35:59] = PALETTE["blue"]  # a 24-pixel square, centre (46.5, 41.5)
    seen, background = read_picture(picture)
    assert background == "gray"
    assert [dataclasses.astuple(s) for s in seen] == [
        ("red", "square", "small", 10.5, 15.5),
        ("blue", "square", "large", 46.5, 41.5),
    ]
    image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    marks = judge(image, ["a small red square left of a large blue square on a gray background"])
    assert all(v.item() == 1 for v in marks.values())
    # dx = 36 exceeds dy = 26, so the red square is left of the blue one and not above it.
    above = judge(image, ["a small red square above a large blue square on a gray background"])
    assert above["relation"].item() == 0 and above["all"].item() == 0 and above["colour"].item() == 1


@pytest.mark.parametrize("attribute", ["size", "colour", "shape", "background", "relation", "count"])
def test_one_wrong_word_fails_that_attribute_and_no_other(attribute):
    words = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS}
    thing = Thing("small", "red", "circle")
    other = Thing("large", "blue", "square")
    for i in range(60):
        caption = Caption(thing, "gray", relation=RELATIONS[i % 4], second=other)
        if attribute == "background":
            wrong = dataclasses.replace(caption, background=["black", "white"][i % 2])
        elif attribute == "relation":
            wrong = dataclasses.replace(caption, relation=RELATIONS[(i + 1 + i % 3) % 4])
        elif attribute == "count":
            caption = Caption(thing, "gray", count=1 + i % 3)
            wrong = dataclasses.replace(caption, count=1 + (i + 1) % 3)
        else:
            options = [w for w in words[attribute] if w != getattr(thing, attribute)]
            changed = dataclasses.replace(thing, **{attribute: options[i % len(options)]})
            wrong = dataclasses.replace(caption, first=changed)
        marks = judge(to_tensor([render(caption, i)]), [str(wrong)])
        assert marks[attribute].item() == 0 and marks["all"].item() == 0, (caption, wrong)
        # A missing or extra thing is seen in its own attributes too; everything else must be untouched.
        others = [n for n in ATTRIBUTES if n not in (attribute, "all") and not marks[n].isnan()]
        if attribute != "count":
            assert all(marks[n].item() == 1 for n in others), (caption, wrong, marks)


def test_random_wrong_words_are_caught(drawn):
    captions, pictures = drawn
    rng = np.random.default_rng(0)
    wrong = [wrong_caption(c, rng) for c in captions]
    assert accuracy(pictures, wrong)["all"] <= 0.005


def test_blur_noise_and_jpeg_do_not_fool_it(drawn):
    captions, pictures = drawn

    def jpeg(picture):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        return Image.open(buffer)

    assert accuracy([p.filter(ImageFilter.GaussianBlur(1.0)) for p in pictures], captions)["all"] >= 0.99
    assert accuracy([jpeg(p) for p in pictures], captions)["all"] >= 0.97
    noisy = to_tensor(pictures) + 0.04 * torch.randn(N, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert judge(noisy, captions)["all"].mean() >= 0.97


def test_spoiled_pictures_fail(drawn):
    captions, pictures = drawn
    images = to_tensor(pictures)[:100]
    some = captions[:100]
    assert judge(torch.rand(100, 3, 64, 64, generator=torch.Generator().manual_seed(1)), some)["all"].sum() == 0
    assert judge(torch.full_like(images, 0.5), some)["all"].sum() == 0  # nothing drawn
    assert judge(torch.full_like(images, float("nan")), some)["all"].sum() == 0
    assert judge(1 - images, some)["all"].sum() == 0  # inverted colours
    covered = images.clone()
    covered[:, :, 24:40, 24:40] = torch.tensor([0.86, 0.16, 0.16]).view(3, 1, 1)  # an extra red square in the middle
    fresh = [i for i, c in enumerate(some) if "red" not in c]  # else the square may melt into a red thing
    assert judge(covered[fresh], [some[i] for i in fresh])["all"].mean() <= 0.02
    halves = torch.cat([images[:, :, :, 32:], images[:, :, :, :32]], dim=-1)  # left and right half exchanged
    sides = [i for i, c in enumerate(some) if parse(c).relation in ("left of", "right of")]
    assert judge(halves[sides], [some[i] for i in sides])["relation"].mean() <= 0.35


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="judge reads"):
        judge(torch.zeros(1, 3, 32, 32), ["a small red circle on a gray background"])
    with pytest.raises(ValueError, match="judge reads"):
        judge(torch.zeros(2, 3, 64, 64), ["a small red circle on a gray background"])
    with pytest.raises(ValueError, match="not a caption"):
        judge(torch.zeros(1, 3, 64, 64), ["a cat"])
