"""Solvers against exact flows: measured order of convergence, on data whose denoiser is known in closed form."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from helpers_samplers import flow_grid, lambda_uniform, noise, uneven_lambda, vp_grid, walk
from scipy.integrate import solve_ivp

from diffusion_align.samplers.tables import solver_table

MEANS = np.array([[1.0, 0.5], [-0.8, 0.9], [0.1, -1.2]])
STDS = np.array([0.5, 0.6, 0.45])
WEIGHTS = np.array([0.5, 0.3, 0.2])


def mixture_clean(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """E[x0 | x = alpha x0 + sigma e] [B,2] for the mixture above, by Bayes' rule over its three parts."""
    variance = alpha**2 * STDS**2 + sigma**2
    apart = x[:, None] - alpha * MEANS
    logit = np.log(WEIGHTS) - (apart**2).sum(-1) / (2 * variance) - np.log(variance)  # two dims
    share = np.exp(logit - logit.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    part = MEANS + (alpha * STDS**2 / variance)[:, None] * apart
    return (share[..., None] * part).sum(1)


START = noise(48, 2, seed=11)
FIRST, LAST = (float(lambda_uniform(1)[i]) for i in (0, 1))


@functools.cache
def mixture_flow() -> np.ndarray:
    """The probability flow of the mixture by an eighth-order Runge-Kutta: du/dlambda = m - u for u = x / alpha."""

    def slope(lam, flat):
        u = flat.reshape(-1, 2)
        alpha, sigma = math.sqrt(1 / (1 + math.exp(-2 * lam))), math.sqrt(1 / (1 + math.exp(2 * lam)))
        return (mixture_clean(alpha * u, alpha, sigma) - u).ravel()

    ends = [math.sqrt(1 / (1 + math.exp(-2 * lam))) for lam in (FIRST, LAST)]
    start = (START.numpy() / ends[0]).ravel()
    solution = solve_ivp(slope, (FIRST, LAST), start, method="DOP853", rtol=1e-11, atol=1e-12)
    return solution.y[:, -1].reshape(-1, 2) * ends[1]


def mixture_error(n: int, **options) -> float:
    table = solver_table(vp_grid(lambda_uniform(n)), eta=0.0, **options)

    def clean(x, k):
        return torch.from_numpy(mixture_clean(x.numpy(), float(table.alpha[k]), float(table.sigma[k])))

    return float(np.sqrt(((walk(table, clean, START).numpy() - mixture_flow()) ** 2).mean()))


@pytest.mark.parametrize(
    ("options", "slope"),
    [
        ({"solver": "ddim"}, 1),
        ({"order": 1}, 1),
        ({"order": 2, "variant": "midpoint"}, 2),
        ({"order": 2, "variant": "heun"}, 2),
        ({"order": 3, "third_order": "published"}, 2),
        ({"order": 3, "third_order": "exact"}, 3),
    ],
    ids=str,
)
def test_order_of_convergence_on_a_mixture(options, slope):
    errors = [mixture_error(n, **options) for n in (80, 160, 320, 640)]
    measured = -np.polyfit(np.log([80, 160, 320, 640]), np.log(errors), 1)[0]
    assert measured == pytest.approx(slope, abs=0.25)
    if options.get("third_order") == "published":
        assert measured < 2.4


def test_third_order_is_worth_its_name_on_fine_grids():
    assert mixture_error(320, order=3, third_order="exact") < mixture_error(320, order=3, third_order="published") / 4
    assert mixture_error(320, order=3, third_order="published") < mixture_error(320, order=2)


def linear_moments(table, spread: float, mean: float) -> tuple[float, float]:
    """Mean and variance at the end of a run on Gaussian data, from exact moments at the start: the recursion is linear.

    The clean prediction at step k is E[x0 | x] = mean + g_k (x - alpha_k mean), so (x_k, m_{k-1}) moves by a matrix.
    """
    gain = (table.alpha * spread**2 / (table.alpha**2 * spread**2 + table.sigma**2)).tolist()
    alpha, cx, c, std = table.alpha.tolist(), table.cx.tolist(), table.c.tolist(), table.std.tolist()
    center = np.array([alpha[0] * mean, 0.0])
    covariance = np.diag([alpha[0] ** 2 * spread**2 + float(table.sigma[0]) ** 2, 0.0])
    for k in range(len(table)):
        intercept = mean * (1 - gain[k] * alpha[k])
        move = np.array([[cx[k] + c[k][0] * gain[k], c[k][1]], [gain[k], 0.0]])
        center = move @ center + np.array([c[k][0], 1.0]) * intercept
        covariance = move @ covariance @ move.T + np.diag([std[k] ** 2, 0.0])
    return float(center[0]), float(covariance[0, 0])


def variance_error(table, spread: float = 0.5) -> float:
    exact = float(table.alpha[-1]) ** 2 * spread**2 + float(table.sigma[-1]) ** 2
    return abs(linear_moments(table, spread, 0.0)[1] / exact - 1)


# Relative error of the final variance, data variance 0.25, n = 20, 40, 80, ..., found once by an independent program.
VARIANCE_ERRORS = [
    ({"order": 1, "eta": 1.0}, [0.357, 0.205, 0.111, 0.0575, 0.0293, 0.0148]),
    ({"order": 2, "eta": 1.0}, [0.0621, 0.0184, 0.00473, 0.00119, 2.98e-4, 7.45e-5]),
    ({"order": 2, "eta": 1.0, "variant": "heun"}, [0.177, 0.0416]),
    ({"order": 1, "eta": 0.0}, [0.213, 0.113, 0.0581]),
    ({"order": 2, "eta": 0.0}, [0.0262, 0.00703, 0.00178, 4.47e-4]),
]


@pytest.mark.parametrize(("options", "known"), VARIANCE_ERRORS, ids=str)
def test_variance_errors_are_the_known_ones(options, known):
    counts = [20 * 2**i for i in range(len(known))]
    got = [variance_error(solver_table(vp_grid(lambda_uniform(n)), **options)) for n in counts]
    np.testing.assert_allclose(got, known, rtol=1e-2)


@pytest.mark.parametrize("grid", [vp_grid, flow_grid])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_gaussian_marginals_converge_with_the_order(grid, eta, order):
    counts = [160, 320, 640, 1280]
    for variant in ("midpoint", "heun"):
        tables = [solver_table(grid(lambda_uniform(n)), order=order, eta=eta, variant=variant) for n in counts]
        measured = -np.polyfit(np.log(counts), np.log([variance_error(t) for t in tables]), 1)[0]
        assert measured == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_gaussian_means_converge(eta):
    errors = []
    for n in (40, 80, 160):
        table = solver_table(vp_grid(lambda_uniform(n)), order=2, eta=eta)
        errors.append(abs(linear_moments(table, 0.5, 0.8)[0] - 0.8 * float(table.alpha[-1])))
    assert max(errors) < 1e-11  # the mean of Gaussian data is exact at any n


def test_moment_recursion_is_what_the_sampler_does():
    """The matrices above, against draws through the kernel: 200 000 runs of eight steps."""
    table = solver_table(vp_grid(uneven_lambda(8)), order=2, eta=1.0)
    spread, mean = 0.5, 0.8
    gain = table.alpha * spread**2 / (table.alpha**2 * spread**2 + table.sigma**2)
    runs = 200_000
    start = table.alpha[0] * mean + (table.alpha[0] ** 2 * spread**2 + table.sigma[0] ** 2).sqrt() * noise(runs, 1)

    def clean(x, k):
        return mean + gain[k] * (x - table.alpha[k] * mean)

    x = walk(table, clean, start, [noise(runs, 1, seed=k + 1) for k in range(8)])
    center, variance = linear_moments(table, spread, mean)
    assert float(x.mean()) == pytest.approx(center, abs=5 * math.sqrt(variance / runs))
    assert float(x.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / runs))


@pytest.mark.parametrize("spread", [0.2, 1.0, 3.0])
def test_the_exact_flow_of_a_gaussian_is_approached(spread):
    """x' = x sqrt((alpha'^2 c^2 + sigma'^2) / (alpha^2 c^2 + sigma^2)) for data N(0, c^2)."""
    table = solver_table(vp_grid(lambda_uniform(800)), order=3, eta=0.0, third_order="exact")
    gain = table.alpha * spread**2 / (table.alpha**2 * spread**2 + table.sigma**2)
    x = noise(6, 1)
    wide = (table.alpha**2 * spread**2 + table.sigma**2).sqrt()
    landed = walk(table, lambda x, k: gain[k] * x, x)
    torch.testing.assert_close(landed, x * wide[-1] / wide[0], rtol=1e-5, atol=0)
