"""Dynamic thresholding by hand, and against diffusers."""

from __future__ import annotations

import diffusers
import pytest
import torch
from helpers_samplers import noise

from diffusion_align.samplers import dynamic_threshold


def test_pictures_inside_the_range_are_left_alone():
    x = noise(2, 3, 8, 8).tanh()
    torch.testing.assert_close(dynamic_threshold(x), x, rtol=0, atol=0)
    torch.testing.assert_close(dynamic_threshold(x, mode="diffusers"), x, rtol=0, atol=0)


def test_each_picture_by_hand():
    """|values| 0 .. 4: the 0.75 quantile is 3. Clipped at 3, divided by 3; the other picture fits and stays."""
    wide = torch.tensor([0.0, -1.0, 2.0, -3.0, 4.0])
    x = torch.stack([wide, wide / 10]).reshape(2, 1, 1, 5)
    out = dynamic_threshold(x, ratio=0.75).reshape(2, 5)
    torch.testing.assert_close(out[0], torch.tensor([0.0, -1 / 3, 2 / 3, -1.0, 1.0]))
    torch.testing.assert_close(out[1], wide / 10)
    # diffusers: the quantile is capped at max_value, by default 1: plain clipping
    out = dynamic_threshold(x, ratio=0.75, mode="diffusers").reshape(2, 5)
    torch.testing.assert_close(out[0], wide.clamp(-1, 1))
    out = dynamic_threshold(x, ratio=0.75, mode="diffusers", max_value=2.0).reshape(2, 5)
    torch.testing.assert_close(out[0], wide.clamp(-2, 2) / 2)
    # original: max_value is the least that s can be
    out = dynamic_threshold(x, ratio=0.75, max_value=2.0).reshape(2, 5)
    torch.testing.assert_close(out[1], wide / 20)


@pytest.mark.parametrize("max_value", [0.5, 1.0, 1.5, 10.0])
def test_diffusers_mode_is_that_of_diffusers(max_value):
    scheduler = diffusers.DDPMScheduler(thresholding=True, sample_max_value=max_value, dynamic_thresholding_ratio=0.9)
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = (3 * noise(4, 3, 8, 8)).to(dtype)
        got = dynamic_threshold(x, ratio=0.9, max_value=max_value, mode="diffusers")
        assert got.dtype == dtype
        torch.testing.assert_close(got, scheduler._threshold_sample(x), rtol=0, atol=0)


def test_result_is_in_range_and_blind_to_order_of_pixels_and_batch():
    x = 4 * noise(3, 3, 6, 6)
    out = dynamic_threshold(x, ratio=0.9)
    assert float(out.abs().max()) == 1.0
    assert ((out.abs() == 1).flatten(1).sum(1) >= 10).all()  # a tenth of 108 values
    torch.testing.assert_close(dynamic_threshold(x.flip(3), ratio=0.9), out.flip(3), rtol=0, atol=0)
    torch.testing.assert_close(dynamic_threshold(x[1:2], ratio=0.9), out[1:2], rtol=0, atol=0)


def test_latents_and_wrong_numbers_are_refused():
    picture = noise(1, 3, 4, 4)
    for wrong in (noise(1, 4, 8, 8), noise(3, 4), noise(1, 16, 8, 8)):
        with pytest.raises(ValueError, match="not latents"):
            dynamic_threshold(wrong)
    for options in ({"mode": "static"}, {"ratio": 0.0}, {"ratio": 1.1}, {"max_value": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            dynamic_threshold(picture, **options)
