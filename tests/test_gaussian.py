import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from diffusion_align.gaussian import Gaussian


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN, OTHER, X = draw(3, 2, 4), draw(3, 2, 4, seed=1), draw(3, 2, 4, seed=2)
STD = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
WIDER = torch.tensor([0.4, 1.0, 1.5], dtype=torch.float64)


def published(mean, std):
    return Independent(Normal(mean, std[:, None, None].expand_as(mean)), 2)


def test_log_prob_and_kl_are_those_of_torch_distributions():
    for std in (STD, WIDER):
        assert torch.allclose(Gaussian(MEAN, std).log_prob(X), published(MEAN, std).log_prob(X), rtol=1e-13)
        kl = kl_divergence(published(MEAN, STD), published(OTHER, std))
        assert torch.allclose(Gaussian(MEAN, STD).kl(Gaussian(OTHER, std)), kl, rtol=1e-12)


def test_log_prob_by_hand():
    """Two dims at 1 std from the mean, std 2: 2 * (-1/2 - log 2 - log(2 pi)/2) = -1 - 2 log 2 - log(2 pi)."""
    step = Gaussian(torch.zeros(1, 2), torch.tensor([2.0]))
    assert step.log_prob(torch.tensor([[2.0, -2.0]])).item() == pytest.approx(
        -1 - 2 * math.log(2) - math.log(2 * math.pi)
    )


@pytest.mark.parametrize("std", [STD, WIDER])
def test_log_ratio_is_the_difference_of_log_probs(std):
    p, q = Gaussian(MEAN, STD), Gaussian(OTHER, std)
    assert torch.allclose(
        p.log_ratio(q, X), published(MEAN, STD).log_prob(X) - published(OTHER, std).log_prob(X), atol=1e-10
    )
    assert torch.allclose(p.log_ratio(q, X), -q.log_ratio(p, X), atol=1e-12)


def test_equal_gaussians_have_exactly_no_ratio():
    for dtype in (torch.float32, torch.float64):
        p, q = (Gaussian(MEAN.to(dtype).clone(), STD.to(dtype).clone()) for _ in range(2))
        assert torch.equal(p.log_ratio(q, X.to(dtype)), torch.zeros(3, dtype=dtype))
        assert torch.equal(p.kl(q), torch.zeros(3, dtype=dtype))


def test_log_ratio_keeps_its_precision_in_float32_where_a_difference_loses_it():
    """16384 dims, means about 1e-5 std apart: ratios are about 1e-3 nats, and log-probs of -3e4 known to 2e-3 only."""
    mean, x = draw(64, 16384).float(), draw(64, 16384, seed=1).float()
    near, std = mean + 1e-5 * draw(64, 16384, seed=2).float(), torch.ones(64)
    a, b, point = near.double(), mean.double(), x.double()
    exact = ((a - b) * (point - (a + b) / 2)).sum(1)
    p, q = Gaussian(near, std), Gaussian(mean, std)
    scale = exact.square().mean().sqrt()
    assert ((p.log_ratio(q, x) - exact).square().mean().sqrt() < 1e-4 * scale).item()
    assert ((p.log_prob(x) - q.log_prob(x) - exact).square().mean().sqrt() > 0.3 * scale).item()


def test_log_ratio_gradient_reaches_the_mean_as_the_difference_does():
    gradients = []
    for score in (lambda p, q: p.log_ratio(q, X), lambda p, q: p.log_prob(X) - q.log_prob(X)):
        mean = MEAN.clone().requires_grad_()
        score(Gaussian(mean, STD), Gaussian(OTHER, STD)).sum().backward()
        gradients.append(mean.grad)
    expected = (X - MEAN) / STD[:, None, None] ** 2
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12) and torch.allclose(gradients[0], expected, atol=1e-12)


def test_kl_is_the_mean_log_ratio():
    """400 000 draws from p; the tolerance is 4.5 standard errors of the mean."""
    n = 400_000
    p = Gaussian(
        torch.tensor([[0.3, -0.2]], dtype=torch.float64).expand(n, 2), torch.full((n,), 0.7, dtype=torch.float64)
    )
    q = Gaussian(torch.zeros(n, 2, dtype=torch.float64), torch.full((n,), 0.9, dtype=torch.float64))
    ratio = p.log_ratio(q, p.sample(draw(n, 2)))
    assert abs(ratio.mean() - p.kl(q)[0]) < 4.5 * ratio.std() / math.sqrt(n)


def test_mean_log_ratio_under_a_third_is_a_difference_of_kls():
    """E_q[log p_theta / p_ref] = -(KL(q || p_theta) - KL(q || p_ref)): what Diffusion-DPO's errors estimate."""
    n = 400_000
    mean = [torch.full((n, 2), v, dtype=torch.float64) for v in (0.1, 0.4, -0.5)]
    data, theta, ref = (Gaussian(m, torch.full((n,), 0.8, dtype=torch.float64)) for m in mean)
    ratio = theta.log_ratio(ref, data.sample(draw(n, 2)))
    assert abs(ratio.mean() + (data.kl(theta) - data.kl(ref))[0]) < 4.5 * ratio.std() / math.sqrt(n)


def test_sample_is_mean_plus_std_times_noise():
    step = Gaussian(torch.ones(2, 3), torch.tensor([1.0, 2.0]))
    assert step.sample(torch.full((2, 3), 0.5))[:, 0].tolist() == [1.5, 2.0]


def test_precision():
    half = Gaussian(MEAN.half(), STD.half())
    assert half.mean.dtype == half.std.dtype == half.log_prob(X.half()).dtype == torch.float32
    assert Gaussian(MEAN.float(), STD).log_prob(X.float()).dtype == torch.float32
    assert Gaussian(MEAN, STD.float()).log_prob(X).dtype == torch.float64


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_std_without_density(bad):
    with pytest.raises(ValueError, match="a step without noise"):
        Gaussian(torch.zeros(2, 3), torch.tensor([1.0, bad]))


def test_refuses_shapes_that_would_broadcast():
    for std in (torch.ones(1), torch.ones(3, 1), torch.tensor(1.0), torch.ones(3, 2, 4)):
        with pytest.raises(ValueError, match=r"\[B\]"):
            Gaussian(MEAN, std)
    p = Gaussian(MEAN, STD)
    for call in (lambda: p.log_prob(X[:1]), lambda: p.sample(X[:1]), lambda: p.kl(Gaussian(MEAN[:1], STD[:1])),
                 lambda: p.log_ratio(Gaussian(MEAN[:1], STD[:1]), X)):  # fmt: skip
        with pytest.raises(ValueError, match="shapes must be equal"):
            call()
