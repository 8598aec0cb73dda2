"""Conversions between a network's output, the clean prediction and the noise. All kinds are linear in
`x = alpha x0 + sigma e`:

    kind               target            clean prediction             squared error, in terms of the noise's
    epsilon            e                 (x - sigma e) / alpha        |de|^2
    sample             x0                x0                           (alpha / sigma)^2 |dx0|^2
    v_prediction       alpha e - sigma x0  alpha x - sigma v          alpha^2 |dv|^2             (alpha^2 + sigma^2 = 1)
    flow_prediction    e - x0            x - sigma u                  alpha^2 |du|^2             (alpha + sigma = 1)

v-prediction: Salimans & Ho 2022, arXiv 2202.00512. Flow: Lipman et al. 2022, arXiv 2210.02747; Liu et al. 2022, arXiv
2209.03003.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .tensors import expand_to, require_same_shape, widen

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""`(x [B,...], t [B]) -> x0 [B,...]`, with prompt, guidance, LoRA and thresholding already bound."""

KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def _level(value: Tensor | float, like: Tensor) -> Tensor | float:
    """A schedule's float64 level in the dtype of `like` and on its device (in this order: it may have no float64); [B]
    gets singleton dims."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return float(value)
    value = value.to(like.dtype).to(like.device)
    return value if value.ndim == like.ndim else expand_to(value, like)


def _require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown prediction kind {kind!r}: expected one of {', '.join(KINDS)}")


def to_clean(output: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, kind: str) -> Tensor:
    """The clean prediction x0 [B,...] of a network's `output` [B,...] at `x` [B,...], float32 at least.

    `alpha` and `sigma` are numbers, [B], or have as many dims as `x`. For epsilon at alpha = 0 it is inf or nan. Raises
    ValueError for an unknown kind or unequal shapes.
    """
    _require_kind(kind)
    require_same_shape(output=output, x=x)
    output, x = widen(output), widen(x)
    a, s = _level(alpha, x), _level(sigma, x)
    if kind == "epsilon":
        return (x - s * output) / a
    if kind == "v_prediction":
        return a * x - s * output
    return output if kind == "sample" else x - s * output


def to_noise(output: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float, kind: str) -> Tensor:
    """The noise prediction e [B,...] of a network's `output`; arguments and errors as `to_clean`.

    For sample at sigma = 0 it is inf or nan.
    """
    _require_kind(kind)
    require_same_shape(output=output, x=x)
    output, x = widen(output), widen(x)
    a, s = _level(alpha, x), _level(sigma, x)
    if kind == "sample":
        return (x - a * output) / s
    if kind == "v_prediction":
        return s * x + a * output
    return output if kind == "epsilon" else x + a * output


def target(clean: Tensor, noise: Tensor, alpha: Tensor | float, sigma: Tensor | float, kind: str) -> Tensor:
    """The correct output of a network of this kind at `add_noise(clean, noise, alpha, sigma)`, [B,...]."""
    _require_kind(kind)
    require_same_shape(clean=clean, noise=noise)
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "flow_prediction":
        return noise - clean
    return _level(alpha, noise) * noise - _level(sigma, clean) * clean


def add_noise(clean: Tensor, noise: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """`x = alpha x0 + sigma e` [B,...], in the dtype of `clean`."""
    require_same_shape(clean=clean, noise=noise)
    return _level(alpha, clean) * clean + _level(sigma, clean) * noise
