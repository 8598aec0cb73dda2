"""A reverse step as a Gaussian. All drawing, log-probs, log-ratios and KL are computed here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .tensors import expand_to, require_same_shape, sum_dims, widen


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, std^2 I) for each sample: `mean` [B,...], `std` [B] > 0. Sums over dims, in nats, float32 at least.

    Raises ValueError when `std` is not [B] of `mean`, or not positive and finite: a step without noise has no density.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", widen(self.mean))
        # The float64 of a table must not promote the batch, nor reach a device without float64.
        object.__setattr__(self, "std", self.std.to(self.mean.dtype).to(self.mean.device))
        expand_to(self.std, self.mean)
        if not bool(((self.std > 0) & self.std.isfinite()).all()):
            raise ValueError("a Gaussian needs positive, finite std: a step without noise (std 0) has no density")

    def _standard(self, x: Tensor) -> Tensor:
        """`x` [B,...] in units of std from the mean, [B,...]."""
        require_same_shape(x=x, mean=self.mean)
        return (x - self.mean) / expand_to(self.std, x)

    @property
    def _dims(self) -> int:
        return math.prod(self.mean.shape[1:])

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std * noise` [B,...], with standard normal `noise` [B,...] from the caller."""
        require_same_shape(noise=noise, mean=self.mean)
        return self.mean + expand_to(self.std, noise) * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at `x` [B,...] in nats, summed over dims, [B]."""
        normaliser = self._dims * (self.std.log() + math.log(2 * math.pi) / 2)
        return -sum_dims(self._standard(x).square()) / 2 - normaliser

    def log_ratio(self, other: Gaussian, x: Tensor) -> Tensor:
        """`self.log_prob(x) - other.log_prob(x)` [B] in nats, without cancellation; exactly 0 between equal Gaussians.

        With u, v the standardised x of self and other, it is sum (v - u)(v + u) / 2 + D log(std_other / std_self);
        v - u is computed from the difference of the means, so it is accurate even if they are close.
        """
        require_same_shape(mean=self.mean, other_mean=other.mean)
        spread = (self.std - other.std) / (self.std * other.std)
        apart = (self.mean - other.mean) / expand_to(other.std, x) + (x - self.mean) * expand_to(spread, x)
        log_std = self._dims * (other.std / self.std).log()
        return sum_dims(apart * (self._standard(x) + other._standard(x))) / 2 + log_std

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other) [B] in nats, summed over dims: the mean of `log_ratio` under self."""
        require_same_shape(mean=self.mean, other_mean=other.mean)
        log_std = (self.std / other.std).log()
        apart = sum_dims(((self.mean - other.mean) / expand_to(other.std, self.mean)).square())
        return apart / 2 + self._dims * ((2 * log_std).expm1() / 2 - log_std)
