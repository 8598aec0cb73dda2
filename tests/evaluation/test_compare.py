"""Intervals and win rates against scipy, exact enumeration and hand arithmetic."""

import itertools
import math
import sys

import numpy as np
import pytest
import scipy.stats
import torch

from diffusion_align.evaluation import compare, compare_metric, reward_gap, wilson
from diffusion_align.evaluation.compare import bootstrap_mean, normal_mean


def draws(n, seed=0, loc=0.0, scale=1.0):
    return loc + scale * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (250, 500), (3, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_wilson_agrees_with_scipy(k, n, level):
    expected = scipy.stats.binomtest(k, n).proportion_ci(confidence_level=level, method="wilson")
    assert wilson(k, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_by_hand_of_halves_and_of_nothing():
    # k = 1.5 of 4 at z = 2: centre (1.5 + 2) / 8 = 0.4375; half sqrt(4 (1.5 * 2.5 / 4 + 1)) / 8 = sqrt(7.75) / 8
    level = 2 * scipy.stats.norm.cdf(2) - 1
    half = math.sqrt(7.75) / 8
    assert wilson(1.5, 4, level) == pytest.approx((0.4375 - half, 0.4375 + half), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes"):
        wilson(5, 4)


def test_the_bootstrap_agrees_with_scipy():
    values = draws(80, loc=0.3).exp()  # skewed, so the two ends are not mirror images
    ours = bootstrap_mean(values, resamples=40_000)
    theirs = scipy.stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=40_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.01)
    assert ours[1] - values.mean() > values.mean() - ours[0]


def test_the_bootstrap_agrees_with_the_exact_one():
    # All 4^4 resamples of four values, equally likely: the bootstrap distribution itself.
    values = torch.tensor([0.0, 1.0, 3.0, 8.0], dtype=torch.float64)
    exact = np.sort([np.mean(c) for c in itertools.product(values.tolist(), repeat=4)])
    for level in (0.5, 0.8):
        low, high = bootstrap_mean(values, resamples=100_000, level=level)
        ends = np.quantile(exact, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        assert (low, high) == pytest.approx(tuple(ends), abs=0.3)  # the exact distribution is a staircase of quarters


def test_the_bootstrap_repeats_for_a_seed_and_any_chunk_size(monkeypatch):
    values = draws(50)
    first = bootstrap_mean(values, seed=3)
    assert first == bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    # The package exports a function of the same name, so the module is reached through sys.modules.
    monkeypatch.setattr(sys.modules["diffusion_align.evaluation.compare"], "_ELEMENTS", 50 * 7)
    assert bootstrap_mean(values, seed=3) == pytest.approx(first, rel=1e-12)  # means of other chunks round otherwise


def test_both_intervals_have_their_nominal_coverage():
    # 400 experiments of 60 differences with mean 0.2: 95 % intervals miss about 20 of them; 3 sd of that count is 13.
    sets = draws(400 * 60, loc=0.2).view(400, 60)
    for interval in (lambda v, i: bootstrap_mean(v, seed=i, resamples=2000), lambda v, i: normal_mean(v)):
        ends = [interval(values, i) for i, values in enumerate(sets)]
        assert 5 <= sum(not low <= 0.2 <= high for low, high in ends) <= 38


def test_the_normal_interval_by_hand():
    # mean 2, sd sqrt(((-1)^2 + 0 + 1^2) / 2) = 1, standard error 1 / sqrt(3)
    low, high = normal_mean(torch.tensor([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 1.959964 / math.sqrt(3), 2 + 1.959964 / math.sqrt(3)), abs=1e-6)


def test_a_comparison_by_hand():
    base = torch.tensor([0.0, 0.0, 1.0, 1.0, math.nan])
    tuned = torch.tensor([1.0, 0.0, 1.0, 0.5, math.nan])
    c = compare_metric(base, tuned)
    assert (c.n, c.base, c.tuned, c.difference) == (4, 0.5, 0.625, 0.125)
    assert (c.wins, c.ties, c.losses, c.win_rate) == (1, 2, 1, 0.5)
    assert (c.win_low, c.win_high) == pytest.approx(tuple(scipy.stats.binomtest(2, 4).proportion_ci(method="wilson")))
    assert c.low <= c.difference <= c.high


def test_intervals_use_the_pairing():
    base = draws(300, scale=10.0)
    tuned = base + 0.1 + draws(300, seed=1, scale=0.1)
    c = compare_metric(base, tuned)
    # Unpaired, the interval would be 3 wide; the pairs' own spread makes it about 0.02.
    assert c.low == pytest.approx(0.1, abs=0.03) and c.high - c.low < 0.04
    assert (c.low, c.high) == pytest.approx((c.normal_low, c.normal_high), abs=0.003)


def test_swapping_base_and_tuned_mirrors_everything():
    base, tuned = draws(40).round(decimals=0), draws(40, seed=2).round(decimals=0)
    one, other = compare_metric(base, tuned), compare_metric(tuned, base)
    assert other.difference == pytest.approx(-one.difference) and other.low == pytest.approx(-one.high)
    assert (other.wins, other.ties, other.losses) == (one.losses, one.ties, one.wins) and one.ties > 0
    assert other.win_low == pytest.approx(1 - one.win_high)


def test_small_differences_are_ties_only_with_a_tolerance():
    base, tuned = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.01, -0.01, 0.5])
    assert compare_metric(base, tuned).ties == 0
    c = compare_metric(base, tuned, tie=0.02)
    assert (c.wins, c.ties, c.losses) == (1, 2, 0)


def test_no_pair_and_one_pair_have_no_interval():
    nothing = compare_metric(torch.tensor([math.nan]), torch.tensor([math.nan]))
    assert nothing.n == 0 and math.isnan(nothing.difference) and math.isnan(nothing.low)
    assert math.isnan(nothing.win_rate) and (nothing.win_low, nothing.win_high) == (0.0, 1.0)
    one = compare_metric(torch.tensor([1.0]), torch.tensor([2.0]))
    assert one.difference == 1.0 and math.isnan(one.low) and math.isnan(one.normal_high)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="pair 1 has a number on one side"):
        compare_metric(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="one length"):
        compare_metric(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="2000"):
        compare_metric(torch.zeros(3), torch.zeros(3), resamples=100)
    with pytest.raises(ValueError, match="'b'"):
        compare({"a": torch.zeros(3)}, {"a": torch.zeros(3), "b": torch.zeros(3)})
    assert list(compare({"a": torch.zeros(3), "b": torch.ones(3)}, {"b": torch.ones(3), "a": torch.ones(3)})) == [
        "a",
        "b",
    ]


def test_the_reward_gap_by_hand():
    #            hacked, hacked, both up, both down, reward still, judge still, no verdict
    base_reward = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.5, 0.0, 9.0])
    tuned_reward = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5, 1.0, 0.0])
    base_judge = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, math.nan])
    tuned_judge = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0, math.nan])
    gap = reward_gap(base_reward, tuned_reward, base_judge, tuned_judge)
    assert gap.n == 6 and gap.table == ((1, 1, 2), (1, 0, 0), (0, 0, 1))
    assert gap.told_apart == 5 and gap.agreement == (1 + 1 + 0.5) / 5
    assert (gap.agreement_low, gap.agreement_high) == wilson(2.5, 5)
    # mean rise (1 + 1 + 1 - 1 + 0 + 1) / 6 = 0.5; the base's rewards 0 0 0 1 .5 0 have mean .25 and variance .875 / 5
    assert gap.reward_gain == pytest.approx(0.5 / math.sqrt(0.175)) and gap.judge_gain == pytest.approx(-1 / 6)


def test_a_reward_that_never_moves_has_no_gain_in_deviations():
    same = torch.ones(4)
    gap = reward_gap(same, same, torch.tensor([0.0, 1, 0, 1]), torch.tensor([0.0, 1, 0, 1]))
    assert math.isnan(gap.reward_gain) and math.isnan(gap.agreement) and gap.told_apart == 0 and gap.table[1][1] == 4


def test_pictures_of_one_prompt_are_drawn_together():
    """Four copies of each of 25 values say no more than the 25: the interval is that of 25, not of 100."""
    few = torch.randn(25, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    copies, groups = few.repeat_interleave(4), torch.arange(25).repeat_interleave(4)
    assert bootstrap_mean(copies, groups=groups) == pytest.approx(bootstrap_mean(few), abs=1e-12)
    assert normal_mean(copies, groups=groups) == pytest.approx(normal_mean(few), abs=1e-12)
    wide, narrow = bootstrap_mean(copies, groups=groups), bootstrap_mean(copies)
    assert 1.7 < (wide[1] - wide[0]) / (narrow[1] - narrow[0]) < 2.3  # sqrt(4)
    # Each its own group: nothing changes.
    assert bootstrap_mean(few, groups=torch.arange(25)) == bootstrap_mean(few)
    with pytest.raises(ValueError, match="one group for each value"):
        bootstrap_mean(few, groups=torch.arange(24))
