import math

import pytest
import torch
from helpers_samplers import SD15, noise
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from diffusion_align.models.analytic import (
    ToyDenoiser,
    gaussian_clean,
    gaussian_denoiser,
    gaussian_flow,
    mixture_clean,
    mixture_denoiser,
    mixture_log_density,
)
from diffusion_align.schedule import Schedule

SCHEDULE = Schedule.from_config(SD15)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def test_gaussian_clean_is_conditioning_of_a_joint_normal():
    """x0 ~ N(0.5, 2^2), x = 0.6 x0 + 0.8 e. Cov(x0, x) = 0.6 * 4 = 2.4, Var x = 0.36 * 4 + 0.64 = 2.08.
    At x = 1.34: 0.5 + 2.4 / 2.08 * (1.34 - 0.3) = 0.5 + 1.2 = 1.7.
    """
    clean = gaussian_clean(torch.tensor([[1.34]]), scalar(0.6), scalar(0.8), scalar(0.5), scalar(2.0))
    assert clean.item() == pytest.approx(1.7)


def test_gaussian_clean_is_the_best_guess():
    """The error of E[x0|x] is uncorrelated with x; a million draws, 4.5 standard errors."""
    n = 1_000_000
    x0, e = 0.5 + 2 * noise(n, 1), noise(n, 1, seed=1)
    x = 0.6 * x0 + 0.8 * e
    error = x0 - gaussian_clean(x, scalar(0.6), scalar(0.8), scalar(0.5), scalar(2.0))
    for statistic in (error, error * x):
        assert statistic.mean().abs() < 4.5 * statistic.std() / math.sqrt(n)


def test_gaussian_flow_solves_the_ode():
    """Against 2000 midpoint steps of dx/dt = x0 (da/dt) + e (ds/dt) on the circle alpha = cos t, sigma = sin t."""
    mean, std, x = scalar([0.5, -1.0]), scalar([2.0, 0.3]), noise(4, 2)
    start, end, steps = 1.4, 0.2, 2000

    def velocity(x, t):
        a, s = scalar(math.cos(t)), scalar(math.sin(t))
        clean = gaussian_clean(x, a, s, mean, std)
        return -s * clean + a * (x - a * clean) / s

    dt, y = (end - start) / steps, x
    for i in range(steps):
        t = start + i * dt
        y = y + dt * velocity(y + dt / 2 * velocity(y, t), t + dt / 2)
    levels = [scalar(f(t)) for t in (start, end) for f in (math.cos, math.sin)]
    assert torch.allclose(gaussian_flow(x, mean, std, *levels), y, atol=1e-6)


def test_mixture_density_is_that_of_torch_distributions():
    x, a, s = noise(50, 2) * 2, scalar(0.6), scalar(0.8)
    spread = ((a * STDS) ** 2 + s**2).sqrt()
    parts = Independent(Normal(a * MEANS, spread[:, None].expand(3, 2)), 1)
    expected = MixtureSameFamily(Categorical(WEIGHTS), parts).log_prob(x)
    assert torch.allclose(mixture_log_density(x, a, s, WEIGHTS, MEANS, STDS), expected, atol=1e-12)


@pytest.mark.parametrize("angle", [0.02, 0.5, 1.2, 1.55])
def test_mixture_clean_is_tweedies_formula(angle):
    """x0 = (x + sigma^2 grad log p(x)) / alpha, the gradient taken by autograd of torch.distributions' density."""
    a, s = scalar(math.cos(angle)), scalar(math.sin(angle))
    x = (a * 2 * noise(40, 2)).requires_grad_()
    cov = torch.eye(2, dtype=torch.float64) * ((a * STDS) ** 2 + s**2)[:, None, None]
    density = MixtureSameFamily(Categorical(WEIGHTS), MultivariateNormal(a * MEANS, cov)).log_prob(x)
    (score,) = torch.autograd.grad(density.sum(), x)
    clean = mixture_clean(x.detach(), a, s, WEIGHTS, MEANS, STDS)
    assert torch.allclose(clean, (x + s**2 * score) / a, atol=1e-10)


def test_denoisers_use_a_time_for_each_sample():
    x, t = noise(3, 2), torch.tensor([10, 500, 999])
    for denoiser in (
        gaussian_denoiser(SCHEDULE, scalar(0.5), scalar(2.0)),
        mixture_denoiser(SCHEDULE, WEIGHTS, MEANS, STDS),
    ):
        whole = denoiser(x, t)
        for i in range(3):
            assert torch.allclose(denoiser(x[i : i + 1], t[i : i + 1])[0], whole[i], atol=1e-14)
    a, s = SCHEDULE.alpha(500.0), SCHEDULE.sigma(500.0)
    assert torch.allclose(whole[1], mixture_clean(x[1:2], a, s, WEIGHTS, MEANS, STDS)[0], atol=1e-14)
    assert denoiser(x.float(), t).dtype == torch.float32


def test_gaussian_denoiser_takes_pictures():
    mean = noise(3, 4, 4)
    denoise = gaussian_denoiser(SCHEDULE, mean, scalar(0.5))
    x = SCHEDULE.alpha(100.0) * mean.expand(2, 3, 4, 4)
    assert torch.allclose(denoise(x, torch.full((2,), 100)), mean.expand(2, 3, 4, 4), atol=1e-14)


def test_toy_denoiser_depends_only_on_its_generator():
    first, same, other = (ToyDenoiser(4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    x, t = noise(5, 2, 2, dtype=torch.float32), torch.full((5,), 300.0)
    assert first(x, t).shape == x.shape
    assert torch.equal(first(x, t), same(x, t)) and not torch.equal(first(x, t), other(x, t))
    assert not torch.equal(first(x, t), first(x, t + 100))
    assert not torch.equal(first(x, t), first(x, t, torch.ones(5, dtype=torch.int64)))


def test_toy_denoiser_gradient():
    toy = ToyDenoiser(2, torch.Generator().manual_seed(0), hidden=4).double()
    x, t = noise(3, 2).requires_grad_(), torch.full((3,), 300.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v, *_: toy(v, t), (x, *toy.parameters()))
    toy(x, t, torch.tensor([0, 1, 1])).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in toy.parameters())
