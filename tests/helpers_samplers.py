"""What several sampler tests need: a walk, a grid without a schedule, and data whose flow is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion_align.samplers.kernel import step_gaussian
from diffusion_align.samplers.tables import StepTable
from diffusion_align.time_grids import TimeGrid

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def walk(table: StepTable, clean_at: Callable[[Tensor, int], Tensor], x: Tensor, draws: Sequence[Tensor] | None = None):
    """The end of a run; `clean_at(x, k)` is the denoiser at level k, `draws` [T] standard normals or None: no noise."""
    history: list[Tensor] = []
    for k in range(len(table)):
        history = [clean_at(x, k), *history[:2]]
        mean, std = step_gaussian(table, k, x, *history)
        x = mean if draws is None else mean + std.reshape(-1, *[1] * (x.ndim - 1)) * draws[k]
    return x


def vp_grid(lam: Tensor) -> TimeGrid:
    """A variance-preserving grid at any half log-SNR [T+1], with lambda itself as the network's time."""
    return TimeGrid(lam[:-1], lam, torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt())


def flow_grid(lam: Tensor) -> TimeGrid:
    return TimeGrid(1000 * torch.sigmoid(-lam[:-1]), lam, torch.sigmoid(lam), torch.sigmoid(-lam))


def vp_linear_lambda(t: float) -> float:
    """Half log-SNR of the continuous VP-linear process, beta 0.1 .. 20: Song et al. 2021 (arXiv 2011.13456), app. B."""
    log_alpha = -(t**2) * (20 - 0.1) / 4 - t * 0.1 / 2
    return log_alpha - 0.5 * math.log(-math.expm1(2 * log_alpha))


def lambda_uniform(n: int, start: float = 1.0, end: float = 1e-3) -> Tensor:
    return torch.linspace(vp_linear_lambda(start), vp_linear_lambda(end), n + 1, dtype=torch.float64)


def uneven_lambda(n: int, seed: int = 3) -> Tensor:
    """Half log-SNR [n+1] rising from -3 with steps between 0.1 and 0.6: no two alike."""
    steps = 0.1 + 0.5 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([torch.tensor([-3.0], dtype=torch.float64), -3.0 + steps.cumsum(0)])
