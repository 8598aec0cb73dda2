"""Base against tuned, prompt by prompt: paired differences and win rates, each with an interval and its n.

Pictures of one prompt are not independent draws, so intervals of differences resample prompts, not pictures, where
`groups` says which pictures share one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ..rng import generator

_ELEMENTS = 1 << 22  # resampled numbers held at once


@dataclass(frozen=True)
class Comparison:
    """One metric on the n pairs to which it applies. Differences are tuned minus base; intervals hold at `level`.

    `low, high` is the bootstrap interval of the mean difference, `normal_low, normal_high` the normal approximation
    beside it as a check. The win rate counts a tie as half a win; its interval is Wilson's.
    """

    n: int
    level: float
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    normal_low: float
    normal_high: float
    wins: int
    ties: int
    losses: int
    win_rate: float
    win_low: float
    win_high: float


@dataclass(frozen=True)
class RewardGap:
    """Whether a reward moves as the judge does, pair by pair.

    `table[i][j]`: pairs where the reward rose, stayed or fell (i) while the judge gained, stayed or lost (j);
    `table[0][2]`, a higher reward for a picture that the judge no longer accepts, is where reward hacking shows.
    `agreement` is how often the reward prefers the judge's picture among the `told_apart` pairs that the judge tells
    apart, ties half, with Wilson's interval. `reward_gain` is the mean rise of the reward in standard deviations of
    the base's rewards.
    """

    n: int
    level: float
    reward_gain: float
    judge_gain: float
    table: tuple[tuple[int, int, int], ...]
    told_apart: int
    agreement: float
    agreement_low: float
    agreement_high: float


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927, JASA 22). `successes` may be fractional; n = 0 gives (0, 1)."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..n, not {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (successes + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (successes * (n - successes) / n + z2 / 4)) / (n + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(
    values: Tensor,
    *,
    groups: Tensor | None = None,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [n], the same for the same seed.

    With `groups` [n] whole groups are drawn (Davison & Hinkley 1997, Bootstrap Methods, sec. 3.8); values of one group
    have equal numbers.

    Raises ValueError below 2000 resamples, whose ends would still be noise. Fewer than two values give (nan, nan).
    """
    if resamples < 2000:
        raise ValueError(f"{resamples} resamples are too few for the ends of an interval: use 2000 or more")
    sums, counts = _totals(values, groups)
    n = len(sums)
    if n < 2:
        return math.nan, math.nan
    source = generator(seed, "bootstrap")
    means = []
    for start in range(0, resamples, rows := max(1, _ELEMENTS // n)):
        drawn = torch.randint(n, (min(rows, resamples - start), n), generator=source)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), tails).tolist()
    return low, high


def normal_mean(values: Tensor, level: float = 0.95, groups: Tensor | None = None) -> tuple[float, float]:
    """The interval of the mean of `values` [n] by the normal approximation, `groups` [n] as in `bootstrap_mean`.

    Fewer than two groups give (nan, nan).
    """
    sums, counts = _totals(values, groups)
    n = len(sums)
    if n < 2:
        return math.nan, math.nan
    mean = sums.sum().item() / counts.sum().item()
    spread = math.sqrt((sums - mean * counts).square().sum().item() * n / (n - 1)) / counts.sum().item()
    half = NormalDist().inv_cdf((1 + level) / 2) * spread
    return mean - half, mean + half


def _totals(values: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum and count of each group, in the order in which groups first appear; without groups each value is its own."""
    if groups is None:
        return values.double(), torch.ones(len(values), dtype=torch.float64)
    if groups.shape != values.shape:
        raise ValueError(f"expected one group for each value, not {list(groups.shape)} for {list(values.shape)}")
    place = {group: i for i, group in enumerate(dict.fromkeys(groups.tolist()))}
    index = torch.tensor([place[group] for group in groups.tolist()], dtype=torch.int64)
    sums = torch.zeros(len(place), dtype=torch.float64).index_add_(0, index, values.double())
    return sums, torch.bincount(index, minlength=len(place)).double()


def _applicable(base: Tensor, tuned: Tensor) -> Tensor:
    """[N] bool: pairs with a number on both sides. What applies depends on the prompt, so never one side only."""
    if base.shape != tuned.shape or base.ndim != 1:
        raise ValueError(f"expected two vectors of one length, not {list(base.shape)} and {list(tuned.shape)}")
    if not torch.equal(base.isnan(), tuned.isnan()):
        first = int((base.isnan() != tuned.isnan()).nonzero()[0])
        raise ValueError(f"pair {first} has a number on one side only")
    return ~base.isnan()


def compare_metric(
    base: Tensor,
    tuned: Tensor,
    *,
    groups: Tensor | None = None,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
    tie: float = 0.0,
) -> Comparison:
    """Compare two vectors [N] of one metric, pair by pair; pairs that are NaN on both sides are left out.

    `groups` [N] numbers the prompts: pictures of one prompt are drawn together by the bootstrap. `tie` is the largest
    difference that still counts as a tie. Raises ValueError when shapes differ or only one side is NaN.
    """
    keep = _applicable(base, tuned)
    base, tuned = base[keep].double(), tuned[keep].double()
    gain, n = tuned - base, int(keep.sum())
    wins, losses = int((gain > tie).sum()), int((gain < -tie).sum())
    ties = n - wins - losses
    won = wins + ties / 2
    same = None if groups is None else groups[keep]
    low, high = bootstrap_mean(gain, groups=same, seed=seed, resamples=resamples, level=level)
    normal_low, normal_high = normal_mean(gain, level, same)
    win_low, win_high = wilson(won, n, level)
    return Comparison(
        n=n,
        level=level,
        base=base.mean().item(),  # of nothing: nan
        tuned=tuned.mean().item(),
        difference=gain.mean().item(),
        low=low,
        high=high,
        normal_low=normal_low,
        normal_high=normal_high,
        wins=wins,
        ties=ties,
        losses=losses,
        win_rate=won / n if n else math.nan,
        win_low=win_low,
        win_high=win_high,
    )


def compare(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    groups: Tensor | None = None,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> dict[str, Comparison]:
    """`compare_metric` for every metric of two results of `score`. Raises ValueError when the metrics differ."""
    if base.keys() != tuned.keys():
        raise ValueError(f"base and tuned were not scored alike: {sorted(base.keys() ^ tuned.keys())}")
    settings = {"seed": seed, "resamples": resamples}
    return {name: compare_metric(base[name], tuned[name], groups=groups, level=level, **settings) for name in base}


def reward_gap(
    base_reward: Tensor, tuned_reward: Tensor, base_judge: Tensor, tuned_judge: Tensor, level: float = 0.95
) -> RewardGap:
    """Set a reward's changes beside the judge's; all [N], judge 1 or 0, NaN where it does not apply."""
    keep = _applicable(base_judge, tuned_judge) & _applicable(base_reward, tuned_reward)
    n = int(keep.sum())
    reward = (tuned_reward - base_reward)[keep].double()
    judge = (tuned_judge - base_judge)[keep].double()
    counts = [[int(((reward.sign() == r) & (judge.sign() == j)).sum()) for j in (1, 0, -1)] for r in (1, 0, -1)]
    told_apart = int((judge != 0).sum())
    agreed = counts[0][0] + counts[2][2] + (counts[1][0] + counts[1][2]) / 2
    spread = base_reward[keep].double().std().item() if n > 1 else 0.0
    low, high = wilson(agreed, told_apart, level)
    return RewardGap(
        n=n,
        level=level,
        reward_gain=reward.mean().item() / spread if spread > 0 else math.nan,
        judge_gain=judge.mean().item() if n else math.nan,
        table=tuple((row[0], row[1], row[2]) for row in counts),
        told_apart=told_apart,
        agreement=agreed / told_apart if told_apart else math.nan,
        agreement_low=low,
        agreement_high=high,
    )
