"""Scoring: every picture once; bad results are errors of one line."""

import math

import pytest
import torch

from diffusion_align.evaluation import score

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]
IMAGES = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def batches(*parts):
    return [(list(part), IMAGES[list(part)]) for part in parts]


def mean_level(images, prompts):
    return images.mean((1, 2, 3))


def length(images, prompts):
    return torch.tensor([float(len(p)) for p in prompts], dtype=torch.float64)


def odd_judge(images, prompts):
    holds = torch.tensor([float(len(p) % 2) for p in prompts])
    return {"all": holds, "relation": torch.where(holds == 1, holds, math.nan)}


def test_scores_land_on_their_prompts_whatever_the_order_of_batches():
    found = score(
        batches([4, 1], [0], [3, 2]), PROMPTS, {"mean": mean_level, "length": length}, judges={"judge": odd_judge}
    )
    assert list(found) == ["mean", "length", "judge/all", "judge/relation"]
    assert found["length"].tolist() == [1, 2, 3, 4, 5] and found["length"].dtype == torch.float32
    torch.testing.assert_close(found["mean"], IMAGES.mean((1, 2, 3)))
    assert found["judge/all"].tolist() == [1, 0, 1, 0, 1]
    assert found["judge/relation"].isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (lambda b: torch.tensor([1.0] * (b - 1) + [math.nan]), r"^bad returned nan for the picture of prompt 1$"),
        (lambda b: torch.tensor([math.inf] + [1.0] * (b - 1)), r"^bad returned inf for the picture of prompt 0$"),
        (lambda b: torch.ones(b, 1), r"^bad returned \[2, 1\] for 2 pictures: expected \[2\]"),
        (lambda b: torch.ones(()), r"^bad returned \[\] for 2 pictures"),
        (lambda b: [1.0] * b, r"^bad returned list for 2 pictures"),
    ],
)
def test_bad_results_are_named_in_one_line(result, match):
    with pytest.raises(ValueError, match=match) as error:
        score(
            batches([0, 1], [2, 3, 4]), PROMPTS, {"good": length, "bad": lambda images, prompts: result(len(prompts))}
        )
    assert "\n" not in str(error.value)


def test_a_judge_may_return_nan_but_not_infinity():
    with pytest.raises(ValueError, match=r"^judge/all returned inf for the picture of prompt 0$"):
        score(batches(range(5)), PROMPTS, {}, judges={"judge": lambda i, p: {"all": torch.full((5,), math.inf)}})


def test_missing_and_repeated_pictures_are_refused():
    with pytest.raises(ValueError, match="1 prompts have no picture or several; the first is number 3"):
        score(batches([0, 1, 2], [4]), PROMPTS, {"length": length})
    with pytest.raises(ValueError, match="the first is number 2"):
        score(batches([0, 1, 2], [2, 3, 4]), PROMPTS, {"length": length})
    with pytest.raises(ValueError, match="the first is number 1"):
        score(batches([0, 1, 1, 2], [3, 4]), PROMPTS, {"length": length})
    with pytest.raises(ValueError, match="indices"):
        score([([0, 7], IMAGES[:2])], PROMPTS, {"length": length})
    with pytest.raises(ValueError, match="indices"):
        score([([0], IMAGES[:2])], PROMPTS, {"length": length})


def test_changing_attributes_and_ambiguous_names_are_refused():
    def moody(images, prompts):
        return {"all": torch.ones(len(prompts)), **({"extra": torch.ones(1)} if len(prompts) == 1 else {})}

    with pytest.raises(ValueError, match="judge/extra"):
        score(batches([0, 1], [2]), PROMPTS[:3], {}, judges={"judge": moody})
    with pytest.raises(ValueError, match='no "/"'):
        score(batches(range(5)), PROMPTS, {"judge/all": length})
