"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) as one batched call of the network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..prediction import Denoiser, to_clean
from ..schedule import Schedule

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(x [B,...], t [B], text [B,L,E]) -> the network's output [B,...]`."""


def guided(predict: Predict, x: Tensor, t: Tensor, text: Tensor, negative: Tensor, scale: float) -> Tensor:
    """`negative + scale (text - negative)` of the outputs, [B,...]; eq. 6 with w = scale - 1.

    Both halves go through the network in one call, negative first; at scale 1 the negative one is not computed.
    `negative` is [B,L,E] or [1,L,E]. The result is the same in every parametrisation, as all are linear in the output.
    """
    if scale == 1.0:
        return predict(x, t, text)
    negative = negative.to(text).expand_as(text)
    both = predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([negative, text]))
    without, with_text = both.chunk(2)
    return without + scale * (with_text - without)


def guided_denoiser(
    predict: Predict, text: Tensor, negative: Tensor, scale: float, schedule: Schedule, prediction_type: str
) -> Denoiser:
    """A network with its prompt bound: the clean prediction `(x [B,...], t [B]) -> x0 [B,...]` under guidance."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        output = guided(predict, x, t, text, negative, scale)
        # One look-up for both, as t comes from the device.
        alpha, sigma = schedule.levels(schedule.half_log_snr(t))
        return to_clean(output, x, alpha, sigma, prediction_type)

    return denoise
