"""Combined rewards by hand, the JPEG's size by Pillow, functions of Python files, the controls."""

import io
import math

import numpy as np
import pytest
import torch
from helpers_rewards import pictures
from PIL import Image

from diffusion_align.rewards import RewardError, load_reward, smallest, standardised, weighted_sum
from diffusion_align.rewards.custom import python_reward
from diffusion_align.shapes import judge


def fixed(*values):
    return lambda images, prompts: torch.tensor(values, dtype=torch.float64)


A, B = fixed(1.0, 4.0, math.nan), fixed(3.0, -2.0, 5.0)
NONE = (torch.zeros(3, 3, 1, 1), ["", "", ""])


def test_weighted_sum_and_smallest():
    assert weighted_sum([A, B], [2.0, -0.5])(*NONE)[:2].tolist() == [0.5, 9.0]
    assert smallest([A, B], [1.0, 1.0])(*NONE)[:2].tolist() == [1.0, -2.0]
    assert smallest([A, B], [4.0, 1.0])(*NONE)[:2].tolist() == [3.0, -2.0]
    assert weighted_sum([A, B], [1, 1])(*NONE)[2].isnan() and smallest([A, B], [1, 1])(*NONE)[2].isnan()


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.nan], [1.0, math.inf], []])
def test_weights_must_be_one_finite_number_each(weights):
    for combine in (weighted_sum, smallest):
        with pytest.raises(ValueError, match="2 rewards need as many finite weights"):
            combine([A, B], weights)
    with pytest.raises(ValueError):
        weighted_sum([], [])


def test_standardising_by_hand():
    # mean 5, squared deviations 9 1 1 9 of four: deviation sqrt 5; the nan is left out
    scores = standardised(fixed(2.0, 4.0, 6.0, 8.0, math.nan))(*NONE)
    expected = [-3 / math.sqrt(5), -1 / math.sqrt(5), 1 / math.sqrt(5), 3 / math.sqrt(5)]
    assert scores[:4].tolist() == pytest.approx(expected, rel=1e-12) and scores[4].isnan()


def test_standardising_what_does_not_vary():
    assert standardised(fixed(7.0, 7.0))(*NONE).tolist() == [0.0, 0.0]
    assert standardised(fixed(0.0))(*NONE).tolist() == [0.0]
    shaken = lambda images, prompts: torch.tensor([20.3, 20.300001, 20.3])  # noqa: E731  (equal but for rounding)
    assert standardised(shaken)(*NONE).tolist() == [0.0, 0.0, 0.0]
    assert standardised(fixed(math.nan, math.inf))(*NONE).isnan().all()
    kept = standardised(lambda images, prompts: torch.tensor([1.0, 3.0]))(*NONE)
    assert kept.dtype == torch.float32 and kept.tolist() == [-1.0, 1.0]


def test_combined_reward_texts():
    images, prompts = pictures(5, (24, 40)), ["a"] * 5
    large = load_reward("jpeg-large")(images, prompts)
    control = load_reward("random", seed=3)(images, prompts)
    both = load_reward("0.5:jpeg-large,-2:random", seed=3)(images, prompts)
    torch.testing.assert_close(both, 0.5 * large - 2 * control)
    torch.testing.assert_close(load_reward("2:jpeg-large")(images, prompts), 2 * large)
    lowest = load_reward("min:jpeg-large,3:random", seed=3)(images, prompts)
    torch.testing.assert_close(lowest, torch.minimum(large, 3 * control))
    standard = load_reward("std:jpeg-large,0.1:jpeg-small")(images, prompts)
    wide = large.double()  # the mean is many deviations from 0
    torch.testing.assert_close(standard, (0.9 * (wide - wide.mean()) / wide.std(correction=0)).float())
    assert load_reward("std:random")(images, prompts).mean().abs() < 1e-6
    with pytest.raises(ValueError, match="people chooses"):
        load_reward("people")


@pytest.mark.parametrize("size", [(24, 40), (64, 64)])
def test_the_jpeg_is_that_of_pillow(size):
    images = pictures(3, size) * 1.1
    images[2] = 0.5
    expected = []
    for picture in (images.clamp(0, 1).double() * 255).round().to(torch.uint8):
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(buffer, "JPEG", quality=95)
        expected.append(len(buffer.getvalue()) / 1000)
    large = load_reward("jpeg-large")(images, ["x"] * 3)
    assert large.tolist() == pytest.approx(expected, rel=1e-6) and large.dtype == torch.float32
    assert torch.equal(load_reward("jpeg-small")(images, ["x"] * 3), -large)
    assert large[2] < large[:2].min() / 2  # a plain picture is a small one
    images[0, 0, 0, 0] = math.nan
    assert load_reward("jpeg-large")(images, ["x"] * 3).isnan().tolist() == [True, False, False]


def test_the_judge_is_a_reward():
    images, prompts = pictures(2, (64, 64)), ["a small red circle on a gray background"] * 2
    marks = judge(images, prompts)
    expected = torch.stack([marks[name] for name in marks if name != "all"]).nanmean(0)
    torch.testing.assert_close(load_reward("judge")(images, prompts), expected)


def write(tmp_path, body):
    (tmp_path / "mine.py").write_text("import torch\n" + body)
    return f"{tmp_path / 'mine.py'}:f"


def test_python_reward(tmp_path):
    images = pictures(3)
    for body in (
        "def f(images, prompts):\n    return images.mean((1, 2, 3)) + torch.tensor([len(p) for p in prompts])",
        "def f(images, prompts):\n    return [float(i.mean()) + len(p) for i, p in zip(images, prompts)]",
    ):
        where = write(tmp_path, body)
        expected = images.mean((1, 2, 3)) + torch.tensor([0, 1, 2])
        torch.testing.assert_close(python_reward(where)(images, ["", "a", "ab"]), expected)
        torch.testing.assert_close(load_reward(f"2:python:{where}")(images, ["", "a", "ab"]), 2 * expected)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(images, prompts): return [0.0]", r"returned \[1\] for 3 pictures"),
        ("def f(images, prompts): return torch.zeros(3, 1)", r"returned \[3, 1\] for 3 pictures"),
        ("def f(images, prompts): return 'no'", "ValueError: could not convert"),
        ("def f(images, prompts): return None", "TypeError"),
        ("def f(images): return [0, 0, 0]", r"TypeError: f\(\) takes 1 positional"),
        ("def f(images, prompts): raise KeyError('colour')", "KeyError: 'colour'"),
    ],
)
def test_python_reward_errors_are_one_line(tmp_path, body, message):
    reward = python_reward(write(tmp_path, body))
    with pytest.raises(RewardError, match=message) as caught:
        reward(pictures(3), ["a"] * 3)
    assert "mine.py:f" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_file_without_the_function_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no function f in"):
        python_reward(write(tmp_path, "g = f = 3"))
    with pytest.raises(RewardError, match="ZeroDivisionError: division by zero"):
        python_reward(write(tmp_path, "1 / 0"))
    with pytest.raises(FileNotFoundError, match="no file none.py"):
        python_reward("none.py:f")
