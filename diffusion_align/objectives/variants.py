"""Variants of Diffusion-DPO: unpaired labels (KTO), no reference (MaPO), a score target (DSPO), a safe loser (SDPO).

SPIN-Diffusion (Yuan et al. 2024, arXiv 2402.10210) needs no loss of its own: use `logistic` with pictures of the data
as winners and samples of the previous iterate, which is also the reference, as losers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import expand_to, require_same_shape, sum_dims, widen
from .checks import require_positive
from .preference import logistic


def kto(
    log_ratio: Tensor,
    desirable: Tensor,
    baseline: float | Tensor,
    beta: float,
    weight_desirable: float = 1.0,
    weight_undesirable: float = 1.0,
) -> Tensor:
    """Diffusion-KTO's loss of single labelled pictures, w (1 - sigmoid(+-beta (log_ratio - baseline))), [B].

    Li et al. 2024, arXiv 2404.04465, after KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8); + where `desirable`
    [B] bool, - elsewhere. `log_ratio` [B] is `ref_err - err` for squared errors. `baseline`, one number or [B] and
    without gradient, is what the policy gains on any picture: in the authors' code the batch's mean log-ratio, at least
    0. Raises ValueError for unequal shapes, labels that are not bool, or beta <= 0.
    """
    require_positive(beta=beta)
    require_same_shape(log_ratio=log_ratio, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool, got {desirable.dtype}: -1 would count as true")
    if isinstance(baseline, Tensor):
        baseline = baseline.detach()
        if baseline.ndim:
            require_same_shape(log_ratio=log_ratio, baseline=baseline)
    gain = beta * (widen(log_ratio) - baseline)
    # 1 - sigmoid(x) = sigmoid(-x), which is accurate for large x.
    good, bad = weight_desirable * torch.sigmoid(-gain), weight_undesirable * torch.sigmoid(gain)
    return torch.where(desirable, good, bad)


def mapo(err_w: Tensor, err_l: Tensor, beta: float, steps: int) -> Tensor:
    """MaPO's loss without a reference: err_w - beta log sigmoid(steps (f(err_w) - f(err_l))), elementwise.

    Hong et al. 2024, arXiv 2406.06424, as in the authors' code: f(m) = (m/2) / (exp(m/2) - 1) falls from 1 with slope
    -1/4, and `steps` is the length of the noise schedule, 1000. Errors are **means over dims**, since f is not linear:
    pass `err / dims`. Raises ValueError for unequal shapes, beta <= 0 or steps <= 0.
    """
    require_positive(beta=beta)
    require_same_shape(err_w=err_w, err_l=err_l)
    err_w, err_l = widen(err_w), widen(err_l)
    return err_w + beta * logistic(_mapo_odds(err_w) - _mapo_odds(err_l), steps)


def _mapo_odds(err: Tensor) -> Tensor:
    half = err / 2
    # Near 0 the quotient is 0/0 and its derivative a difference of large numbers; the series has an error of 4e-11.
    far = half.clamp(min=0.1)
    series = 1 - half / 2 + half.square() / 12 - half.pow(4) / 720
    return torch.where(half < 0.1, series, far * (-far).exp() / -torch.expm1(-far))


def dspo(
    output_w: Tensor, target_w: Tensor, ref_output_w: Tensor, margin: Tensor, beta: float, strength: float
) -> Tensor:
    """DSPO's loss, the squared error of the winner alone with a target pushed away from the reference, [B].

        |(out_w - target_w) - c (out_w - ref_out_w)|^2, summed over dims,   c = strength (1 - sigmoid(beta margin))

    Zhu et al. 2025, "DSPO: direct score preference optimization for diffusion model alignment", as in the authors' code
    for Stable Diffusion 1.5, where strength is their beta, 0.001, and beta the same number per squared error
    ("salesforce"). For fixed c < 1 the minimum is target_w + c / (1 - c) (target_w - ref_out_w). Outputs are [B,...],
    `margin` [B] is that of `diffusion_dpo_margin`; as there, the gradient flows through it too. Raises ValueError for
    shapes that do not fit, beta <= 0 or strength <= 0.
    """
    require_positive(beta=beta, strength=strength)
    require_same_shape(output_w=output_w, target_w=target_w, ref_output_w=ref_output_w)
    output = widen(output_w)
    push = expand_to(strength * torch.sigmoid(-beta * widen(margin)), output)
    return sum_dims(((output - widen(target_w)) - push * (output - widen(ref_output_w))).square())


@torch.no_grad()
def sdpo_scale(residual_w: Tensor, residual_l: Tensor, keep: float, *, per_sample: bool = False) -> Tensor:
    """Diffusion-SDPO's scale for the loser's gradient, in [0, 1], [B]: the largest that keeps the winner safe.

    Fu et al. 2025, arXiv 2511.03317. Residuals q [B,...] are output minus target. If the network's Jacobians at winner
    and loser are assumed equal, a step of a DPO loss moves the winner's output along -(q_w - lambda q_l), and changes
    its squared error by -2 (|q_w|^2 - lambda <q_w, q_l>) times the step. The error does not rise, and falls by at least
    the fraction `keep` (mu) of its fall without the loser, for

        lambda = min(1, (1 - keep) |q_w|^2 / <q_w, q_l>) where <q_w, q_l> > 0, else 1

    Products run over the whole batch, as in the authors' code, or over each sample. Apply it to the loser's error with
    `scale_gradient`. Raises ValueError for unequal shapes or keep outside [0, 1].
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must lie in [0, 1], got {keep}")
    require_same_shape(residual_w=residual_w, residual_l=residual_l)
    residual_w, residual_l = widen(residual_w), widen(residual_l)
    own, shared = sum_dims(residual_w.square()), sum_dims(residual_w * residual_l)
    if not per_sample:
        own, shared = own.sum().expand_as(own), shared.sum().expand_as(shared)
    return torch.where(shared > 0, ((1 - keep) * own / shared).clamp(max=1), 1)


def scale_gradient(x: Tensor, scale: float | Tensor) -> Tensor:
    """`x` itself, with its gradient times `scale`, a number or a tensor of x's shape that takes no gradient."""
    if isinstance(scale, Tensor):
        if scale.ndim:
            require_same_shape(x=x, scale=scale)
        scale = scale.detach()
    return x.detach() + scale * (x - x.detach())
