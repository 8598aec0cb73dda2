"""Dynamic thresholding of clean predictions, for models in pixel space only."""

from __future__ import annotations

import torch

from ..tensors import expand_to, widen

MODES = ("original", "diffusers")


def dynamic_threshold(
    clean: torch.Tensor, *, ratio: float = 0.995, max_value: float = 1.0, mode: str = "original"
) -> torch.Tensor:
    """Clip each picture of `clean` [B,C,H,W] at its own level s and divide by s, so that it fits [-1, 1].

    p is the `ratio` quantile of the picture's |values|. mode "original": s = max(p, max_value) (Saharia et al. 2022,
    Imagen, arXiv 2205.11487, sec. 2.3). mode "diffusers": s = p clamped to [1, max_value], what diffusers' schedulers
    do with `sample_max_value`; at its default 1 that is plain clipping to [-1, 1].

    Apply it to a clean prediction before that enters a step or the history of later steps. Latents are not bounded, so
    anything but one or three channels is refused; and the clip stops gradients, so leave it out of training.
    Raises ValueError for another shape, an unknown mode, a ratio outside (0, 1] or a max_value that is not positive.
    """
    if clean.ndim != 4 or clean.shape[1] not in (1, 3):
        raise ValueError(f"thresholding is for pictures [B,C,H,W] of 1 or 3 channels, not latents: {list(clean.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode is one of {MODES}, not {mode!r}")
    if not 0 < ratio <= 1 or not max_value > 0:
        raise ValueError(f"ratio is in (0, 1] and max_value positive, not {ratio!r} and {max_value!r}")
    values = widen(clean)
    p = torch.quantile(values.abs().flatten(1), ratio, dim=1)
    # If max_value < 1 the order matters: the upper bound wins, as in torch.clamp.
    s = p.clamp(min=max_value) if mode == "original" else p.clamp(min=1.0).clamp(max=max_value)
    s = expand_to(s, values)
    return (values.clamp(-s, s) / s).to(clean.dtype)
