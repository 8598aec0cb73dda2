"""How far apart two sets of pictures are, and how varied one prompt's pictures are, in the features of some network.

Pure functions of features [N,D]. The figures mean nothing without the network's name, which the report gives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEW_FOR_FID = 2048
"""With fewer pictures a Frechet distance depends more on their number than on them (Binkowski et al. 2018)."""
_ROWS = 2048  # rows of a kernel matrix held at once
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def diversity(features: Tensor, groups: Tensor) -> Tensor:
    """Mean of 1 - cosine over the pairs of each group of pictures, nan where a group has one; [G], in order of number.

    features [N,D]; groups [N] int64 numbers the prompts from 0.
    """
    unit = torch.nn.functional.normalize(features.cpu().double(), dim=1)
    groups = groups.cpu()
    count = int(groups.max()) + 1 if len(groups) else 0
    sums = torch.zeros(count, unit.shape[1], dtype=unit.dtype).index_add_(0, groups, unit)
    size = torch.bincount(groups, minlength=count).double()
    # The sum over all ordered pairs of different pictures is |sum|^2 less the n squared lengths, which are 1.
    cosine = (sums.square().sum(1) - size) / (size * (size - 1))
    return torch.where(size > 1, 1 - cosine, torch.nan)


def kid(x: Tensor, y: Tensor) -> float:
    """Squared kernel distance, unbiased, with the kernel (x.y / D + 1)^3 (Binkowski 2018, arXiv 1801.01401, eq. 4).

    x [N,D], y [M,D]. All pictures at once, not a mean over random subsets. May be below 0.
    Raises ValueError for fewer than 2 pictures on a side, or other widths.
    """
    x, y = _sides(x, y)

    def total(a: Tensor, b: Tensor) -> float:
        return sum(float((part @ b.T / a.shape[1] + 1).pow(3).sum()) for part in a.split(_ROWS))

    def itself(a: Tensor) -> float:
        return float((a.square().sum(1) / a.shape[1] + 1).pow(3).sum())

    n, m = len(x), len(y)
    within = (total(x, x) - itself(x)) / (n * (n - 1)) + (total(y, y) - itself(y)) / (m * (m - 1))
    return within - 2 * total(x, y) / (n * m)


def cmmd(x: Tensor, y: Tensor) -> float:
    """CMMD: 1000 times the squared distance with the kernel exp(-|x - y|^2 / (2 10^2)) of unit features.

    Jayasumana et al. 2024, arXiv 2401.09603, sec. 4, with their code's constants and its biased mean; meant for
    CLIP ViT-L/14 features at 336 px. x [N,D], y [M,D]. Raises ValueError as `kid`.
    """
    x, y = (torch.nn.functional.normalize(side, dim=1) for side in _sides(x, y))

    def mean(a: Tensor, b: Tensor) -> float:
        parts = a.split(_ROWS)
        # Of unit vectors: |a - b|^2 = 2 - 2 a.b
        return sum(float(((part @ b.T - 1) / CMMD_SIGMA**2).exp().sum()) for part in parts) / (len(a) * len(b))

    return CMMD_SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    FID where the features are Inception's. x [N,D], y [M,D]; see FEW_FOR_FID. Raises ValueError as `kid`.
    """
    x, y = _sides(x, y)
    mean = (x.mean(0) - y.mean(0)).square().sum()
    first, second = (torch.cov(side.T).reshape(x.shape[1], x.shape[1]) for side in (x, y))
    # trace sqrt(A B) = trace sqrt(sqrt(A) B sqrt(A)), of a symmetric matrix: no complex square root is needed.
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(mean + first.trace() + second.trace() - 2 * cross))


def _sides(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected features [N,D] and [M,D], not {list(x.shape)} and {list(y.shape)}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"two or more pictures a side are needed, not {len(x)} and {len(y)}")
    x, y = x.cpu().double(), y.cpu().double()  # in this order: the device may have no float64
    if not (math.isfinite(float(x.sum())) and math.isfinite(float(y.sum()))):
        raise ValueError("features are not finite")
    return x, y
