"""Noise in a window of a run: which steps have it, and that the mixture samples what both of its samplers do."""

import pytest
import torch
from helpers_samplers import SD15, noise, vp_grid, walk

from diffusion_align.models.analytic import gaussian_clean
from diffusion_align.samplers import noise_window, solver_table, step_table
from diffusion_align.schedule import Schedule

SCHEDULE = Schedule.from_config(SD15)


def tables(steps=8, order=2, **more):
    return [step_table(SCHEDULE, steps, order=order, eta=eta, **more) for eta in (1.0, 0.0)]


@pytest.mark.parametrize("order", [1, 2])
def test_inside_steps_have_noise_and_outside_they_have_none(order):
    """A run of the mixture, against the two samplers walked by turns."""
    sde, ode = tables(order=order)
    mixed = noise_window(sde, ode, 3, 2)
    assert mixed.stochastic.tolist() == [k in (3, 4) for k in range(8)]

    def clean_at(x, k):
        return torch.tanh(x + 0.1 * k)

    x = x_T = noise(5, 2, 2)
    draws, history = noise(8, 5, 2, 2, seed=1), []
    for k in range(8):
        table = sde if k in (3, 4) else ode
        history.insert(0, clean_at(x, k))
        x = (
            table.cx[k] * x
            + sum(c * m for c, m in zip(table.c[k], history[:3], strict=False))
            + table.std[k] * draws[k]
        )
    torch.testing.assert_close(walk(mixed, clean_at, x_T, draws), x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("first", [0, 40, 80])
def test_the_mixture_samples_the_data(first):
    """With the exact denoiser of Gaussian data, noise in whichever window leaves their mean and deviation."""
    mean, std = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.3, 1.2], dtype=torch.float64)
    grid = vp_grid(torch.linspace(-3, 4, 121, dtype=torch.float64))
    table = noise_window(*(solver_table(grid, order=2, eta=eta) for eta in (1.0, 0.0)), first, 30)
    alpha, sigma = table.alpha, table.sigma
    x = alpha[0] * mean + (alpha[0] ** 2 * std**2 + sigma[0] ** 2).sqrt() * noise(20_000, 2)
    draws = [noise(20_000, 2, seed=k + 1) for k in range(120)]
    end = walk(table, lambda x, k: gaussian_clean(x, alpha[k], sigma[k], mean, std), x, draws)
    torch.testing.assert_close(end.mean(0), alpha[-1] * mean, rtol=0, atol=0.02)
    torch.testing.assert_close(end.std(0), (alpha[-1] ** 2 * std**2 + sigma[-1] ** 2).sqrt(), rtol=0.02, atol=0)


def test_a_window_that_does_not_fit_is_refused():
    sde, ode = tables()
    for first, count in ((0, 0), (-1, 2), (6, 2), (7, 1), (8, 1)):  # the last step of 8 has no noise
        with pytest.raises(ValueError, match="do not all have noise"):
            noise_window(sde, ode, first, count)
    with pytest.raises(ValueError, match="same grid"):
        noise_window(sde, tables(9)[1], 0, 1)
    with pytest.raises(ValueError, match="same grid"):
        noise_window(sde, tables(order=1)[1], 0, 1)
    with pytest.raises(ValueError, match="eta=0"):
        noise_window(sde, sde, 0, 1)
