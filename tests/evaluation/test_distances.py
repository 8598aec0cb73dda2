"""Distances of sets of pictures against sums written out, scipy's matrix square root and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffusion_align import rng
from diffusion_align.evaluation import distances
from diffusion_align.evaluation.distances import cmmd, diversity, frechet, kid

X = rng.normal((7, 3), 0, "x", dtype=torch.float64)
Y = 0.5 + 1.3 * rng.normal((5, 3), 0, "y", dtype=torch.float64)


@pytest.fixture(params=[2, 2048])
def rows(request, monkeypatch):
    """Kernel matrices in parts, and whole."""
    monkeypatch.setattr(distances, "_ROWS", request.param)


def test_kid_is_the_mean_over_pairs_of_different_pictures(rows):
    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    same_x = np.mean([kernel(a, b) for i, a in enumerate(X) for j, b in enumerate(X) if i != j])
    same_y = np.mean([kernel(a, b) for i, a in enumerate(Y) for j, b in enumerate(Y) if i != j])
    across = np.mean([kernel(a, b) for a in X for b in Y])
    assert kid(X, Y) == pytest.approx(same_x + same_y - 2 * across, rel=1e-12)


def test_kid_of_one_distribution_is_zero_on_average():
    """Unbiased: over many draws of both sides from one Gaussian the mean is 0 within its own error."""
    draws = rng.normal((400, 2, 6, 3), 0, "kid", dtype=torch.float64)
    values = torch.tensor([kid(a, b) for a, b in draws])
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(len(values))


def test_cmmd_is_the_gaussian_kernel_of_unit_features(rows):
    def unit(v):
        return [float(p) / math.sqrt(sum(float(q) ** 2 for q in v)) for p in v]

    def kernel(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(unit(a), unit(b), strict=True)) / (2 * 10**2))

    def mean(u, v):
        return np.mean([kernel(a, b) for a in u for b in v])

    assert cmmd(X, Y) == pytest.approx(1000 * (mean(X, X) + mean(Y, Y) - 2 * mean(X, Y)), rel=1e-8)
    assert cmmd(X, X) == pytest.approx(0, abs=1e-9) and cmmd(X, 5 * X) == pytest.approx(0, abs=1e-9)


def test_frechet_against_scipys_matrix_square_root():
    a, b = X.numpy(), Y.numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = gap + np.trace(first + second - 2 * np.real(sqrtm(first @ second)))
    assert frechet(X, Y) == pytest.approx(expected, rel=1e-9)
    assert frechet(X, X + 2.0) == pytest.approx(3 * 4.0, rel=1e-9)  # a shift alone is its squared length


def test_frechet_of_one_dimension_is_the_closed_form():
    x, y = X[:, :1], Y[:, :1]
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert frechet(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_diversity_is_the_mean_over_pairs_of_each_group():
    groups = torch.tensor([0, 1, 0, 2, 0, 2, 4])
    found = diversity(X.float(), groups)
    unit = X / X.norm(dim=1, keepdim=True)
    pairs = {0: [(0, 2), (0, 4), (2, 4)], 2: [(3, 5)]}
    for group, members in pairs.items():
        expected = np.mean([1 - float(unit[i] @ unit[j]) for i, j in members])
        assert float(found[group]) == pytest.approx(expected, rel=1e-5)
    assert found.isnan().tolist() == [False, True, False, True, True]
    assert float(diversity(X[:1].expand(4, 3), torch.zeros(4, dtype=torch.int64))[0]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("distance", [kid, cmmd, frechet])
def test_bad_features_are_refused(distance):
    with pytest.raises(ValueError, match="two or more pictures a side"):
        distance(X[:1], Y)
    with pytest.raises(ValueError, match=r"\[N,D\] and \[M,D\]"):
        distance(X, Y[:, :2])
    with pytest.raises(ValueError, match="not finite"):
        distance(torch.where(X > 1, math.nan, X), Y)
