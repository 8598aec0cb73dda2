import math

import numpy as np
import pytest
import torch
from helpers_objectives import draw, gradient, tensor

from diffusion_align.gaussian import Gaussian
from diffusion_align.objectives import clamped, d3po, logistic, spo, stepwise_range

LOSSES = {"d3po": d3po, "spo": spo}


def as_published(q_w, q_l, beta, clip):
    """The authors' form, with the ratio itself: -log sigmoid(beta (log clamp(e^q_w) - log clamp(e^q_l)))."""
    held = [np.log(np.clip(np.exp(q.numpy()), 1 - clip, 1 + clip)) for q in (q_w, q_l)]
    return np.log1p(np.exp(-beta * (held[0] - held[1])))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(7,), (5, 7)])
def test_the_published_form(name, shape):
    q_w, q_l = 0.1 * draw(*shape, seed=1), 0.1 * draw(*shape, seed=2)
    for beta, clip in ((0.1, 0.1), (10.0, 0.1), (3.0, 0.4)):
        expected = as_published(q_w, q_l, beta, clip)
        assert np.allclose(LOSSES[name](q_w, q_l, beta, clip).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_by_hand(name):
    """q = 0.05 and -0.02, beta 10, inside the clip: softplus(-0.7) = log(1 + 0.496585) = 0.403186, and its slope is
    -10 sigmoid(-0.7) = -3.318122. With q_w = 0.5, held at log 1.1 = 0.0953102: softplus(-1.153102) = 0.274335.
    """
    q_w, q_l = tensor(0.05).requires_grad_(), tensor(-0.02).requires_grad_()
    loss = LOSSES[name](q_w, q_l, 10.0, 0.1)
    assert loss.item() == pytest.approx(0.403186, abs=1e-6)
    slopes = [slope.item() for slope in gradient(loss, q_w, q_l)]
    assert slopes == pytest.approx([-3.318122, 3.318122], abs=1e-6)
    assert LOSSES[name](tensor(0.5), q_l.detach(), 10.0, 0.1).item() == pytest.approx(0.274335, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_log_2_at_the_reference(name):
    q = torch.zeros(4, dtype=torch.float64)
    for clip in (0.1, None):
        assert LOSSES[name](q, q, 10.0, clip).tolist() == pytest.approx([math.log(2)] * 4, abs=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_clip_it_is_dpo(name):
    q_w, q_l = 3 * draw(9, seed=1), 3 * draw(9, seed=2)
    assert torch.allclose(LOSSES[name](q_w, q_l, 2.0, None), logistic(q_w - q_l, 2.0), atol=1e-12)
    # A change common to both sides says nothing of the pair.
    shifted = LOSSES[name](q_w + 0.7, q_l + 0.7, 2.0, None)
    assert torch.allclose(shifted, LOSSES[name](q_w, q_l, 2.0, None), atol=1e-12)


def test_swapping_the_sides_costs_beta_times_the_clamped_margin():
    q_w, q_l = 0.1 * draw(9, seed=1), 0.1 * draw(9, seed=2)
    cost = d3po(q_l, q_w, 10.0, 0.1) - d3po(q_w, q_l, 10.0, 0.1)
    held = [q.clamp(math.log(0.9), math.log(1.1)) for q in (q_w, q_l)]
    assert torch.allclose(cost, 10.0 * (held[0] - held[1]), atol=1e-12)


def test_reach_of_the_published_constants():
    """+-beta log(1.1 / 0.9): softplus(-+0.0200671) = 0.683164 and 0.703231; at beta 10, 0.126131 and 2.132838."""
    assert stepwise_range(0.1, 0.1) == pytest.approx((0.683164, 0.703231), abs=1e-6)
    assert stepwise_range(10.0, 0.1) == pytest.approx((0.126131, 2.132838), abs=1e-6)
    assert stepwise_range(1.0, None) == (0.0, math.inf)
    far = tensor(-50.0, -1.0, 0.0, 0.3, 50.0)
    losses = d3po(far.repeat(5), far.repeat_interleave(5), 0.1, 0.1)
    assert (losses.min().item(), losses.max().item()) == pytest.approx(stepwise_range(0.1, 0.1), abs=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_a_clamped_side_has_no_gradient_and_the_other_keeps_its_own(name):
    q_w, q_l = tensor(0.2, 0.05, -0.2, 0.05).requires_grad_(), tensor(0.05, -0.2, 0.05, 0.2).requires_grad_()
    slope_w, slope_l = gradient(LOSSES[name](q_w, q_l, 2.0, 0.1), q_w, q_l)
    assert clamped(q_w, 0.1).tolist() == [True, False, True, False]
    assert clamped(q_l, 0.1).tolist() == [False, True, False, True]
    assert ((slope_w == 0) == clamped(q_w, 0.1)).all() and ((slope_l == 0) == clamped(q_l, 0.1)).all()
    assert (slope_w[~clamped(q_w, 0.1)] < 0).all() and (slope_l[~clamped(q_l, 0.1)] > 0).all()


def test_the_ends_of_the_band_are_those_of_the_ratio():
    """0.9 and 1.1, not +-0.1: log 0.9 = -0.10536, log 1.1 = 0.09531."""
    assert clamped(tensor(-0.1053, -0.1054, 0.0953, 0.0954), 0.1).tolist() == [False, True, False, True]
    assert not clamped(tensor(-9.0, 9.0), None).any()
    assert not clamped(tensor(0.2).requires_grad_(), 0.1).requires_grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("clip", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_far_out(name, clip, dtype):
    """exp(1e4) is inf, and the clamp of it has a gradient of 0 times inf."""
    values = torch.tensor([-1e4, -800.0, 0.0, 800.0, 1e4], dtype=dtype)
    q_w, q_l = values.repeat(5).requires_grad_(), values.repeat_interleave(5).requires_grad_()
    loss = LOSSES[name](q_w, q_l, 1.0, clip)
    assert loss.isfinite().all()
    assert all(slope.isfinite().all() for slope in gradient(loss, q_w, q_l))


def test_children_of_one_parent_need_one_difference_of_means():
    """q_w - q_l = sum (mean_theta - mean_ref)(y_w - y_l) / std^2: it is linear in the policy's mean."""
    mean, ref, y_w, y_l = (draw(4, 3, 2, seed=seed) for seed in range(4))
    mean.requires_grad_()
    std = tensor(0.5, 0.7, 0.9, 1.1)
    policy, reference = Gaussian(mean, std), Gaussian(ref, std)
    loss = spo(policy.log_ratio(reference, y_w), policy.log_ratio(reference, y_l), 0.3, None)
    margin = ((mean - ref) * (y_w - y_l)).flatten(1).sum(1) / std**2
    assert torch.allclose(loss, torch.nn.functional.softplus(-0.3 * margin), atol=1e-12)
    expected = -0.3 * torch.sigmoid(-0.3 * margin)[:, None, None] * (y_w - y_l) / std[:, None, None] ** 2
    assert torch.allclose(gradient(loss, mean)[0], expected, atol=1e-12)


def test_refusals():
    flat, column = torch.zeros(4), torch.zeros(4, 1)
    for call in LOSSES.values():
        with pytest.raises(ValueError, match="shapes must be equal"):
            call(flat, column, 1.0, 0.1)
        with pytest.raises(TypeError, match="clip"):
            call(flat, flat, 1.0)  # type: ignore[call-arg]
        for beta in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="beta"):
                call(flat, flat, beta, 0.1)
        for clip in (0.0, 1.0, -0.1, math.nan):
            with pytest.raises(ValueError, match="clip"):
                call(flat, flat, 1.0, clip)
    with pytest.raises(ValueError, match="clip"):
        clamped(flat, 1.5)
    assert d3po(flat.bfloat16(), flat.bfloat16(), 1.0, 0.1).dtype == torch.float32
