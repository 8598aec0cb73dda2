import math

import numpy as np
import pytest
import torch
from helpers_objectives import draw, gradient, tensor

from diffusion_align.objectives import (
    beta_per_squared_error,
    diffusion_dpo_margin,
    dspo,
    kto,
    logistic,
    mapo,
    scale_gradient,
    sdpo_scale,
)


def test_kto_by_hand():
    """Gains 0.5 over a baseline of 0.2, beta 2: sigmoid(-0.6) = 0.354344 for a wanted one, sigmoid(0.6) = 0.645656 for
    an unwanted one; slopes -+2 * 0.354344 * 0.645656 = -+0.457568."""
    log_ratio = tensor(0.5, 0.5).requires_grad_()
    loss = kto(log_ratio, torch.tensor([True, False]), 0.2, 2.0)
    assert loss.tolist() == pytest.approx([0.354344, 0.645656], abs=1e-6)
    assert gradient(loss, log_ratio)[0].tolist() == pytest.approx([-0.457568, 0.457568], abs=1e-6)
    weighted = kto(log_ratio.detach(), torch.tensor([True, False]), 0.2, 2.0, 3.0, 0.5)
    assert weighted.tolist() == pytest.approx([3 * 0.354344, 0.5 * 0.645656], abs=1e-5)


def test_kto_against_the_published_form():
    """w (1 - sigmoid(label beta (g - KL))), label +-1."""
    g, label = draw(20), torch.where(draw(20, seed=1) > 0, 1, -1)
    expected = np.where(label > 0, 0.8, 1.3) * (1 - 1 / (1 + np.exp(-label.numpy() * 1.7 * (g.numpy() - 0.3))))
    assert np.allclose(kto(g, label > 0, 0.3, 1.7, 0.8, 1.3).numpy(), expected, rtol=1e-12)
    per_sample = kto(g, label > 0, torch.full((20,), 0.3, dtype=torch.float64), 1.7, 0.8, 1.3)
    assert np.allclose(per_sample.numpy(), expected, rtol=1e-12)


def test_kto_baseline_takes_no_gradient_and_far_out_is_finite():
    g = tensor(-1e4, 1e4, 0.0).requires_grad_()
    loss = kto(g, torch.tensor([True, False, True]), g.mean(), 1.0)
    slope = gradient(loss, g)[0]
    assert loss.tolist() == [1, 1, 0.5] and slope.tolist() == pytest.approx([0, 0, -0.25])


def test_mapo_against_the_published_form():
    err_w, err_l = (0.05 + 0.3 * torch.rand(9, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    w, el = err_w.numpy() / 2, err_l.numpy() / 2
    odds = w / (np.exp(w) - 1) - el / (np.exp(el) - 1)
    expected = err_w.numpy() + 0.1 * np.log1p(np.exp(-1000 * odds))
    assert np.allclose(mapo(err_w, err_l, 0.1, 1000).numpy(), expected, rtol=1e-9)


def test_mapo_gradient_by_hand():
    """Equal errors: 1 + beta T |f'| / 2 for the winner, -beta T |f'| / 2 for the loser; f'(0) = -1/4, and at m = 0.1,
    f(m) = y/(e^y - 1) with y = .05: 1/2 (1/.0512711 - .05 * 1.0512711/.0512711^2) = 1/2 * -.491668 = -.245834."""
    for err, slope in ((0.0, 0.25), (0.1, 0.245834)):
        err_w, err_l = tensor(err).requires_grad_(), tensor(err).requires_grad_()
        loss = mapo(err_w, err_l, 0.1, 1000)
        assert loss.item() == pytest.approx(err + 0.1 * math.log(2), abs=1e-12)
        slopes = [each.item() for each in gradient(loss, err_w, err_l)]
        assert slopes == pytest.approx([1 + 50 * slope, -50 * slope], abs=1e-4)


def test_mapo_is_smooth_where_series_and_quotient_meet():
    err = tensor(0.2 - 1e-9, 0.2 + 1e-9).requires_grad_()
    loss = mapo(err, torch.full_like(err, 0.3), 0.1, 1000)
    slope = gradient(loss, err)[0]
    assert loss[0].item() == pytest.approx(loss[1].item(), abs=1e-6)
    assert slope[0].item() == pytest.approx(slope[1].item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapo_finite_at_both_ends(dtype):
    err_w = torch.tensor([0.0, 1e-8, 1e-4, 50.0, 1e4], dtype=dtype, requires_grad=True)
    err_l = torch.tensor([1e4, 0.0, 1e-8, 0.0, 1e4], dtype=dtype, requires_grad=True)
    loss = mapo(err_w, err_l, 0.1, 1000)
    slopes = gradient(loss, err_w, err_l)
    assert loss.isfinite().all() and all(slope.isfinite().all() for slope in slopes)
    assert slopes[0][2].item() == pytest.approx(1 + 0.1 * 1000 * 0.25 / (1 + math.exp(-0.025)), rel=1e-2)


def dspo_inputs():
    out, target, ref = (draw(4, 3, 2, seed=seed) for seed in range(3))
    return out.requires_grad_(), target, ref


def test_dspo_against_the_published_form():
    """The mean over dims of ((out - e) - b (1 - sigmoid(z)) (out - ref))^2, with z = -b/2 the gap of mean errors."""
    out, target, ref = dspo_inputs()
    err_l, ref_err_l, dims, b = draw(4, seed=5).abs(), draw(4, seed=6).abs(), 6, 0.8
    err_w, ref_err_w = ((each - target).square().flatten(1).sum(1) for each in (out, ref))
    margin = diffusion_dpo_margin(err_w, err_l, ref_err_w, ref_err_l)
    loss = dspo(out, target, ref, margin, beta_per_squared_error(b, dims, "salesforce"), b)

    z = -b / 2 * ((err_w - err_l) - (ref_err_w - ref_err_l)) / dims
    residual = (out - target) - b * (1 - 1 / (1 + torch.exp(-z)))[:, None, None] * (out - ref)
    published = residual.square().mean((1, 2))
    assert torch.allclose(loss / dims, published, rtol=1e-12)
    assert torch.allclose(gradient(loss / dims, out)[0], gradient(published, out)[0], atol=1e-12)


def test_dspo_aims_beyond_the_target_away_from_the_reference():
    """At a fixed margin of 0, c = strength / 2; the gradient vanishes at target + c / (1 - c) (target - ref)."""
    _, target, ref = dspo_inputs()
    aim = (target + 0.15 / 0.85 * (target - ref)).requires_grad_()
    loss = dspo(aim, target, ref, torch.zeros(4, dtype=torch.float64), 2.0, 0.3)
    assert loss.abs().max() < 1e-24 and gradient(loss, aim)[0].abs().max() < 1e-12
    # A pair that is already told apart is a plain regression on the winner.
    out = dspo_inputs()[0]
    far = dspo(out, target, ref, torch.full((4,), 1e4, dtype=torch.float64), 2.0, 0.3)
    assert torch.allclose(far, (out - target).square().flatten(1).sum(1), atol=1e-12)


def test_sdpo_scale_by_hand():
    """q_w = (1, 0), keep 0.1. Of q_l = (2, 1) may stay 0.9 * 1 / 2 = 0.45; of (-2, 1), which helps, all; of (0.5, 1),
    which would allow 1.8, all."""
    q_w = tensor(1, 0).expand(3, 2)
    q_l = torch.stack([tensor(2, 1), tensor(-2, 1), tensor(0.5, 1)])
    assert sdpo_scale(q_w, q_l, 0.1, per_sample=True).tolist() == pytest.approx([0.45, 1, 1])
    # Over the batch: 0.9 * 3 / (2 - 2 + 0.5) = 5.4, so 1; without the middle one 0.9 * 2 / 2.5 = 0.72.
    assert sdpo_scale(q_w, q_l, 0.1).tolist() == [1, 1, 1]
    assert sdpo_scale(q_w[::2], q_l[::2], 0.1).tolist() == pytest.approx([0.72] * 2)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_sdpo_keeps_the_winners_error_from_rising(per_sample, keep):
    """One small step down the DPO loss on a bias that both outputs share (equal Jacobians), with and without the scale.

    The loser's residual is along the winner's and longer, so plain DPO raises the winner's error. Scaled, it falls by
    the share `keep` of what a step on the winner's own error would give, since here the bound binds.
    """
    q_w, beta = draw(4, 5), 1e-9  # so small a beta that sigmoid(-z), which the bound leaves out, is 1/2 for all
    q_l = 2 * q_w + 0.3 * draw(4, 5, seed=1)

    def first_order(scale):
        bias = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
        err_w, err_l = ((q + bias).square().sum(1) for q in (q_w, q_l))
        ref = torch.zeros(4, dtype=torch.float64)
        margin = diffusion_dpo_margin(err_w, scale_gradient(err_l, scale), ref, ref)
        step = -gradient(logistic(margin, beta), bias)[0] / beta
        own = -gradient(err_w / 2, bias)[0]
        changes = [(2 * q_w * each).sum(1) for each in (step, own)]
        return changes if per_sample else [each.sum() for each in changes]  # the promise is kept where products run

    assert (first_order(1.0)[0] > 0).all()
    scaled, own = first_order(sdpo_scale(q_w, q_l, keep, per_sample=per_sample))
    assert torch.allclose(scaled, keep * own, atol=1e-6)


def test_sdpo_of_equal_sides_cancels_and_without_harm_is_plain_dpo():
    q = draw(4, 5)
    assert sdpo_scale(q, q, 0.0).tolist() == pytest.approx([1.0] * 4)
    assert (sdpo_scale(q, q, 1.0) == 0).all() and (sdpo_scale(q, -q, 0.9) == 1).all()
    err = draw(4).abs().requires_grad_()
    assert torch.equal(scale_gradient(err, 1.0), err) and torch.equal(
        gradient(scale_gradient(err, 1.0), err)[0], torch.ones(4).double()
    )
    assert not sdpo_scale(q.requires_grad_(), q, 0.5).requires_grad
    zero = torch.zeros(2, 3)
    assert (sdpo_scale(zero, zero, 0.5, per_sample=True) == 1).all()


def test_scale_gradient_scales_nothing_but_the_gradient():
    x, scale = draw(4).requires_grad_(), tensor(0.0, 0.5, 1.0, 2.0).requires_grad_()
    y = scale_gradient(x, scale)
    assert torch.equal(y, x)
    slopes = torch.autograd.grad(y.square().sum(), (x, scale), allow_unused=True)
    assert slopes[1] is None and torch.allclose(slopes[0], scale.detach() * 2 * x.detach())


def test_refusals():
    flat, column, labels = torch.zeros(4), torch.zeros(4, 1), torch.ones(4, dtype=torch.bool)
    for call in (
        lambda: kto(flat, labels[:, None], 0.0, 1.0),
        lambda: kto(flat, labels, column, 1.0),
        lambda: mapo(flat, column, 0.1, 1000),
        lambda: dspo(column, column, flat, flat, 1.0, 1.0),
        lambda: sdpo_scale(column, flat, 0.5),
        lambda: scale_gradient(flat, column),
    ):
        with pytest.raises(ValueError, match="shapes must be equal"):
            call()
    with pytest.raises(ValueError, match="one value per sample"):
        dspo(column, column, column, column, 1.0, 1.0)
    with pytest.raises(ValueError, match="bool"):
        kto(flat, flat, 0.0, 1.0)
    for call in (
        lambda: kto(flat, labels, 0.0, 0.0),
        lambda: mapo(flat, flat, -1.0, 1000),
        lambda: mapo(flat, flat, 0.1, 0),
        lambda: dspo(column, column, column, flat, 0.0, 1.0),
        lambda: dspo(column, column, column, flat, 1.0, 0.0),
    ):
        with pytest.raises(ValueError, match="positive"):
            call()
    for keep in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="keep"):
            sdpo_scale(column, column, keep)
