"""Exact denoisers of Gaussian data and of mixtures of Gaussians, and a small network to test gradients on."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from ..prediction import Denoiser
from ..tensors import expand_to


class Levels(Protocol):
    """What these denoisers need of a schedule: signal and noise level at the timesteps `t`."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...


def _levels(schedule: Levels, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return expand_to(schedule.alpha(t).to(x), x), expand_to(schedule.sigma(t).to(x), x)


def gaussian_clean(x: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[x0 | x] for data N(mean, diag std^2), x = alpha x0 + sigma e: linear in x. All broadcast against x [B,...]."""
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return mean + gain * (x - alpha * mean)


def gaussian_denoiser(schedule: Levels, mean: Tensor, std: Tensor) -> Denoiser:
    """The exact denoiser of data N(mean, diag std^2); `mean`, `std` have the shape of one sample, or are scalars."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return gaussian_clean(x, *_levels(schedule, x, t), mean.to(x), std.to(x))

    return denoise


def gaussian_flow(
    x: Tensor, mean: Tensor, std: Tensor, alpha: Tensor, sigma: Tensor, next_alpha: Tensor, next_sigma: Tensor
) -> Tensor:
    """The state at the next levels when the probability-flow ODE starts from `x` [B,...] at (alpha, sigma).

    Data are N(mean, diag std^2); the flow keeps each coordinate's place in units of the marginal standard deviation.
    """
    spread = (alpha**2 * std**2 + sigma**2).sqrt()
    next_spread = (next_alpha**2 * std**2 + next_sigma**2).sqrt()
    return next_alpha * mean + (x - alpha * mean) * next_spread / spread


def mixture_log_density(
    x: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor, means: Tensor, stds: Tensor
) -> Tensor:
    """Log-density [B] in nats of x = alpha x0 + sigma e, for a mixture of M isotropic Gaussians.

    x [B,D]; alpha, sigma [B,1] or scalar; weights [M] sum to 1; means [M,D]; stds [M] > 0.
    """
    return _component_logits(x, alpha, sigma, weights, means, stds).logsumexp(1)


def _component_logits(x: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor, means: Tensor, stds: Tensor) -> Tensor:
    """Log of weight times density of each component at x, [B,M]."""
    spread = (alpha**2 * stds**2 + sigma**2).sqrt()  # [B,M] or [M]
    standard = (x[:, None] - alpha[..., None] * means) / spread[..., None]
    normal = -standard.square().sum(-1) / 2 - x.shape[1] * (spread.log() + math.log(2 * math.pi) / 2)
    return weights.log() + normal


def mixture_clean(x: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor, means: Tensor, stds: Tensor) -> Tensor:
    """E[x0 | x] [B,D] for a mixture: each component's answer times its probability given x.

    Shapes as `mixture_log_density`.
    """
    probability = _component_logits(x, alpha, sigma, weights, means, stds).softmax(1)
    a, s = alpha[..., None], sigma[..., None]  # against [B,M,D]
    each = gaussian_clean(x[:, None], a, s, means, stds[:, None])
    return (probability[..., None] * each).sum(1)


def mixture_denoiser(schedule: Levels, weights: Tensor, means: Tensor, stds: Tensor) -> Denoiser:
    """The exact denoiser of a mixture of isotropic Gaussians on [B,D]; weights [M], means [M,D], stds [M]."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return mixture_clean(x, *_levels(schedule, x, t), weights.to(x), means.to(x), stds.to(x))

    return denoise


class ToyDenoiser(nn.Module):
    """A small network that predicts the clean sample [B,...] of `dims` numbers; smooth, without dropout.

    `condition` [B] adds a learned offset per class; class 0 stands for the empty prompt. `generator` draws all weights.
    """

    def __init__(
        self, dims: int, generator: torch.Generator, hidden: int = 32, classes: int = 2, layers: int = 2
    ) -> None:
        super().__init__()
        widths = [dims + 1] + [hidden] * layers + [dims]
        self.weights = nn.ParameterList(
            torch.randn(fan_out, fan_in, generator=generator) / fan_in**0.5
            for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True)
        )
        self.biases = nn.ParameterList(0.1 * torch.randn(width, generator=generator) for width in widths[1:])
        self.classes = nn.Parameter(0.5 * torch.randn(classes, hidden, generator=generator))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            condition = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        h = torch.cat([x.flatten(1), (t.to(x) / 1000)[:, None]], 1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = nn.functional.linear(h, weight, bias)
            if i == 0:
                h = h + self.classes[condition]
            if i < len(self.weights) - 1:
                h = torch.tanh(h)
        return h.reshape(x.shape)
