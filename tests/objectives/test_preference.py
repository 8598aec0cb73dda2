import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from diffusion_align.objectives import (
    beta_per_squared_error,
    diffusion_dpo_margin,
    hinge,
    implicit_accuracy,
    ipo,
    logistic,
    logistic_range,
    robust,
)

LINKS = {
    "logistic": lambda m, beta: logistic(m, beta),
    "smoothed": lambda m, beta: logistic(m, beta, label_smoothing=0.1),
    "robust": lambda m, beta: robust(m, beta, flip=0.1),
    "hinge": hinge,
    "ipo": ipo,
}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


MARGINS = torch.linspace(-8, 8, 33, dtype=torch.float64)


def test_margin_by_hand():
    """Winner's error fell from 1.2 to 1.0, loser's rose from 2.5 to 2.9: -((1.0-1.2) - (2.9-2.5)) = 0.2 + 0.4 = 0.6."""
    assert diffusion_dpo_margin(tensor(1.0), tensor(2.9), tensor(1.2), tensor(2.5)).item() == pytest.approx(
        0.6, abs=1e-12
    )


def test_losses_by_hand():
    """margin 0.6, beta 2, so z = 1.2: softplus(-1.2) = log(1 + 0.301194) = 0.263282; softplus(1.2) = 1.463282.
    Smoothed, q = 0.1: 0.9 * 0.263282 + 0.1 * 1.463282 = 0.383282. Robust: (0.9 * 0.263282 - 0.1 * 1.463282) / 0.8 =
    0.113282. Hinge: 1 - 1.2 < 0, so 0; at margin 0.2, 1 - 0.4 = 0.6. IPO: (0.6 - 1/4)^2 = 0.1225.
    """
    margin = tensor(0.6)
    assert logistic(margin, 2.0).item() == pytest.approx(0.263282, abs=1e-6)
    assert logistic(margin, 2.0, label_smoothing=0.1).item() == pytest.approx(0.383282, abs=1e-6)
    assert robust(margin, 2.0, flip=0.1).item() == pytest.approx(0.113282, abs=1e-6)
    assert hinge(margin, 2.0).item() == 0 and hinge(tensor(0.2), 2.0).item() == pytest.approx(0.6)
    assert ipo(margin, 2.0).item() == pytest.approx(0.1225)


def test_logistic_is_torchs_binary_cross_entropy():
    for q, beta in itertools.product((0.0, 0.1, 0.3), (0.5, 3.0)):
        expected = F.binary_cross_entropy_with_logits(beta * MARGINS, torch.full_like(MARGINS, 1 - q), reduction="none")
        assert torch.allclose(logistic(MARGINS, beta, q), expected, rtol=1e-12)


def test_robust_is_unbiased_under_flipped_labels():
    """Flip each label with chance q: the mean of the robust loss over flips is the logistic loss of the true labels."""
    q = 0.3
    mean = (1 - q) * robust(MARGINS, 2.0, q) + q * robust(-MARGINS, 2.0, q)
    assert torch.allclose(mean, logistic(MARGINS, 2.0), atol=1e-12)
    assert torch.equal(robust(MARGINS, 2.0, 0.0), logistic(MARGINS, 2.0))


def test_dpo_losses_are_log_2_at_the_reference():
    errors = torch.rand(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    margin = diffusion_dpo_margin(errors[0], errors[1], errors[0], errors[1])
    assert torch.equal(margin, torch.zeros(5, dtype=torch.float64))
    for name in ("logistic", "smoothed", "robust"):
        assert LINKS[name](margin, 2000.0).tolist() == pytest.approx([math.log(2)] * 5, abs=1e-15)


def test_swapping_the_pair_negates_the_margin_and_costs_beta_margin():
    e = torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    margin, swapped = diffusion_dpo_margin(*e), diffusion_dpo_margin(e[1], e[0], e[3], e[2])
    assert torch.allclose(swapped, -margin, atol=1e-15)
    assert torch.allclose(logistic(swapped, 3.0) - logistic(margin, 3.0), 3.0 * margin, atol=1e-12)
    shifted = diffusion_dpo_margin(e[0] + 0.7, e[1] + 0.7, e[2], e[3])
    assert torch.allclose(shifted, margin, atol=1e-12)


def test_gradients_lower_the_winners_error_and_raise_the_losers():
    """dL/d err_w = +beta sigmoid(-z) and dL/d err_l = -beta sigmoid(-z); the reference's errors count the other way."""
    e = [
        v.clone().requires_grad_()
        for v in torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ]
    logistic(diffusion_dpo_margin(*e), 3.0).sum().backward()
    slope = 3.0 * torch.sigmoid(-3.0 * diffusion_dpo_margin(*e).detach())
    for error, sign in zip(e, (1, -1, -1, 1), strict=True):
        assert error.grad is not None and torch.allclose(error.grad, sign * slope, atol=1e-12)


@pytest.mark.parametrize("name", LINKS)
def test_every_link_pushes_an_undecided_margin_up(name):
    margin = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    LINKS[name](margin, 0.5).sum().backward()
    assert margin.grad is not None and (margin.grad < 0).all()


def test_one_step_down_raises_the_implicit_accuracy():
    """Errors linear in two parameters: all ties at the reference; one gradient step ranks every pair as labelled."""
    x = torch.rand(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ref_w, ref_l = (x + 1).sum(1), (2 * x + 1).sum(1)
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def margin():
        return diffusion_dpo_margin((x * theta + 1).sum(1), (2 * x * theta + 1).sum(1), ref_w, ref_l)

    assert implicit_accuracy(margin()).tolist() == [0.5] * 6
    logistic(margin(), 1.0).mean().backward()
    assert theta.grad is not None
    with torch.no_grad():
        theta -= 0.1 * theta.grad
    assert implicit_accuracy(margin()).tolist() == [1.0] * 6


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_far_out(name, dtype):
    margin = torch.tensor([-1e4, -50, 0, 50, 1e4], dtype=dtype, requires_grad=True)
    loss = LINKS[name](margin, 1.0)
    loss.sum().backward()
    assert loss.isfinite().all() and margin.grad is not None and margin.grad.isfinite().all()
    assert (margin.grad[0] < 0).all()  # the worst pair still pulls


def test_logistic_far_out_by_hand():
    """softplus(1e4) = 1e4 with slope -1; the naive -log(sigmoid(-1e4)) is inf."""
    margin = tensor(-1e4).requires_grad_()
    loss = logistic(margin, 1.0)
    loss.sum().backward()
    assert loss.item() == 1e4 and margin.grad is not None and margin.grad.item() == -1


def test_smoothing_has_its_minimum_where_it_should():
    q = 0.2
    margin = tensor(math.log((1 - q) / q) / 2.0).requires_grad_()
    logistic(margin, 2.0, q).sum().backward()
    assert margin.grad is not None and abs(margin.grad.item()) < 1e-12


def test_conventions_give_the_published_losses():
    """beta 5000: the authors' code has -(5000/2) times a gap of per-dim means, diffusers' script -2500 times it."""
    dims, gen = 48, torch.Generator().manual_seed(0)
    squares = torch.rand(4, 5, dims, generator=gen, dtype=torch.float64) * 1e-3
    mean = squares.mean(2)
    published = F.softplus(5000 / 2 * ((mean[0] - mean[1]) - (mean[2] - mean[3])))
    margin = diffusion_dpo_margin(*squares.sum(2))
    assert torch.allclose(logistic(margin, beta_per_squared_error(5000, dims, "salesforce")), published, rtol=1e-12)
    assert torch.allclose(logistic(margin, beta_per_squared_error(2500, dims, "diffusers")), published, rtol=1e-12)
    assert torch.allclose(logistic(margin, beta_per_squared_error(2500 / dims, dims, "sum")), published, rtol=1e-12)


def test_beta_of_stable_diffusion():
    """5000 / (2 * 4 * 64 * 64) = 0.152588; SDXL, 4 * 128 * 128 dims: 0.038147."""
    assert beta_per_squared_error(5000, 16384, "salesforce") == pytest.approx(0.152588, abs=1e-6)
    assert beta_per_squared_error(5000, 65536, "salesforce") == pytest.approx(0.038147, abs=1e-6)


def test_logistic_range():
    """A margin within +-log(1.1/0.9) = +-0.200671, at beta 0.1: softplus(-+0.0200671) = 0.683164 and 0.703231."""
    reach = math.log(1.1) - math.log(0.9)
    assert logistic_range(-reach, reach, 0.1) == pytest.approx((0.683164, 0.703231), abs=1e-6)
    low, high = logistic_range(-4.0, 4.0, 1.0, label_smoothing=0.1)  # least at log 9 = 2.197, the entropy of a 0.1 coin
    assert low == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert high == pytest.approx(logistic(tensor(-4.0), 1.0, 0.1).item())


def test_ties_count_half():
    assert implicit_accuracy(tensor(2.0, 0.0, -1.0)).tolist() == [1.0, 0.5, 0.0]


def test_half_precision_is_widened():
    margin = torch.tensor([1.0], dtype=torch.bfloat16)
    assert all(link(margin, 1.0).dtype == torch.float32 for link in LINKS.values())
    assert diffusion_dpo_margin(*[margin] * 4).dtype == torch.float32


def test_shapes_that_would_broadcast_raise():
    flat, column = torch.ones(4), torch.ones(4, 1)
    for place in range(4):
        errors = [flat] * 4
        errors[place] = column
        with pytest.raises(ValueError, match="shapes must be equal"):
            diffusion_dpo_margin(*errors)
    with pytest.raises(ValueError, match=r"must be \[B\]"):
        diffusion_dpo_margin(*[column] * 4)


def test_beta_has_no_default():
    for call in (logistic, hinge, ipo):
        with pytest.raises(TypeError, match="beta"):
            call(MARGINS)  # type: ignore[call-arg]
    for link in LINKS.values():
        for beta in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="beta"):
                link(MARGINS, beta)


def test_refusals():
    for q in (-0.1, 0.5, 1.0):
        with pytest.raises(ValueError, match="flipped"):
            logistic(MARGINS, 1.0, label_smoothing=q)
        with pytest.raises(ValueError, match="flipped"):
            robust(MARGINS, 1.0, flip=q)
    with pytest.raises(ValueError, match="convention"):
        beta_per_squared_error(1.0, 4, "mean")
    with pytest.raises(ValueError, match="dims"):
        beta_per_squared_error(1.0, 0, "sum")
    with pytest.raises(ValueError, match="beta"):
        beta_per_squared_error(0.0, 4, "sum")
    with pytest.raises(ValueError, match="lowest"):
        logistic_range(1.0, -1.0, 1.0)
