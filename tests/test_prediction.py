import itertools

import pytest
import torch

from diffusion_align.prediction import KINDS, add_noise, target, to_clean, to_noise

VP = (torch.tensor([0.6, 0.8, 0.28], dtype=torch.float64), torch.tensor([0.8, 0.6, 0.96], dtype=torch.float64))
FLOW = (torch.tensor([0.6, 0.9, 0.25], dtype=torch.float64), torch.tensor([0.4, 0.1, 0.75], dtype=torch.float64))


def levels(kind):
    return FLOW if kind == "flow_prediction" else VP


def batch(seed, dtype=torch.float64):
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_hand_values():
    """alpha 0.6, sigma 0.8, x0 = 2, e = -1: x = 1.2 - 0.8 = 0.4; v = 0.6 * -1 - 0.8 * 2 = -2.2.
    Flow with alpha 0.6, sigma 0.4: x = 1.2 - 0.4 = 0.8; u = e - x0 = -3; x0 = 0.8 + 0.4 * 3 = 2.
    """
    clean, noise = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    x = add_noise(clean, noise, 0.6, 0.8)
    assert x.item() == pytest.approx(0.4)
    assert target(clean, noise, 0.6, 0.8, "v_prediction").item() == pytest.approx(-2.2)
    assert to_clean(torch.tensor([[-2.2]]), x, 0.6, 0.8, "v_prediction").item() == pytest.approx(2)
    assert to_noise(torch.tensor([[-2.2]]), x, 0.6, 0.8, "v_prediction").item() == pytest.approx(-1)
    assert to_clean(noise, x, 0.6, 0.8, "epsilon").item() == pytest.approx(2)
    assert to_noise(clean, x, 0.6, 0.8, "sample").item() == pytest.approx(-1)
    x = add_noise(clean, noise, 0.6, 0.4)
    assert target(clean, noise, 0.6, 0.4, "flow_prediction").item() == -3
    assert to_clean(torch.tensor([[-3.0]]), x, 0.6, 0.4, "flow_prediction").item() == pytest.approx(2)
    assert to_noise(torch.tensor([[-3.0]]), x, 0.6, 0.4, "flow_prediction").item() == pytest.approx(-1)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_agrees_with_diffusers(kind):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(prediction_type=kind)
    scheduler.set_timesteps(10)
    for step in (0, 4, 9):
        scheduler._step_index = step
        output, x = batch(1), batch(2)
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[step].double())
        expected = scheduler.convert_model_output(output, sample=x)
        assert torch.allclose(to_clean(output, x, alpha, sigma, kind), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_gives_back_clean_and_noise(kind):
    clean, noise = batch(0), batch(1)
    alpha, sigma = levels(kind)
    x, out = add_noise(clean, noise, alpha, sigma), target(clean, noise, alpha, sigma, kind)
    assert torch.allclose(to_clean(out, x, alpha, sigma, kind), clean, atol=1e-12)
    assert torch.allclose(to_noise(out, x, alpha, sigma, kind), noise, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_any_output_is_consistent(kind):
    """Clean and noise prediction of one output mix back to x."""
    out, x = batch(3), batch(4)
    alpha, sigma = levels(kind)
    clean, noise = to_clean(out, x, alpha, sigma, kind), to_noise(out, x, alpha, sigma, kind)
    assert torch.allclose(add_noise(clean, noise, alpha, sigma), x, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_squared_errors_convert(kind):
    """|de|^2 is |de|^2, (alpha/sigma)^2 |dx0|^2, alpha^2 |dv|^2 and, for flow, (1-sigma)^2 |du|^2."""
    clean, noise, error = batch(0), batch(1), batch(2)
    alpha, sigma = levels(kind)
    factor = {
        "epsilon": alpha**0,
        "sample": (alpha / sigma) ** 2,
        "v_prediction": alpha**2,
        "flow_prediction": (1 - sigma) ** 2,
    }
    x, out = add_noise(clean, noise, alpha, sigma), target(clean, noise, alpha, sigma, kind) + error
    native = error.square().flatten(1).sum(1)
    as_noise = (to_noise(out, x, alpha, sigma, kind) - noise).square().flatten(1).sum(1)
    assert torch.allclose(as_noise, factor[kind] * native, rtol=1e-12)


def test_levels_may_be_numbers_vectors_or_broadcastable():
    out, x = batch(0), batch(1)
    alpha, sigma = VP
    whole = to_clean(out, x, alpha, sigma, "epsilon")
    assert torch.equal(whole, to_clean(out, x, alpha.reshape(3, 1, 1), sigma.reshape(3, 1, 1), "epsilon"))
    assert torch.equal(whole[1:2], to_clean(out[1:2], x[1:2], 0.8, 0.6, "epsilon"))
    assert torch.equal(whole[1:2], to_clean(out[1:2], x[1:2], alpha[1], sigma[1], "epsilon"))


def test_precision_follows_the_batch_not_the_schedule():
    for dtype, kind in itertools.product((torch.float32, torch.float16), KINDS):
        out, x = batch(0, torch.float32).to(dtype), batch(1, torch.float32).to(dtype)
        assert to_clean(out, x, *VP, kind).dtype == torch.float32
        assert to_noise(out, x, *VP, kind).dtype == torch.float32
        assert add_noise(out, x, *VP).dtype == dtype


def test_refusals():
    x = batch(0)
    for function in (to_clean, to_noise, target):
        with pytest.raises(ValueError, match="unknown prediction kind 'eps'"):
            function(x, x, 0.6, 0.8, "eps")
        with pytest.raises(ValueError, match="shapes must be equal"):
            function(x, x[:1], 0.6, 0.8, "epsilon")
    with pytest.raises(ValueError, match=r"\[B\]"):
        add_noise(x, x, torch.ones(4), torch.ones(4))
