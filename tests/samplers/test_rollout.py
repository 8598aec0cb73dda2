import math
from dataclasses import replace

import pytest
import torch
from helpers_samplers import SD15, noise
from torch.distributions import Normal

from diffusion_align.models.analytic import ToyDenoiser, gaussian_denoiser, mixture_denoiser
from diffusion_align.rng import generator
from diffusion_align.samplers import replay, rollout, sample, step_table
from diffusion_align.samplers.rollout import draw_noise
from diffusion_align.schedule import Schedule
from diffusion_align.trajectory import Trajectory

SCHEDULE = Schedule.from_config(SD15)
FLOW = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})


def toy(seed=0, dims=6, dtype=torch.float64):
    return ToyDenoiser(dims, torch.Generator().manual_seed(seed)).to(dtype)


def table_of(order=2, steps=6, **options):
    return step_table(SCHEDULE, steps, order=order, **options)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("order", [1, 2])
def test_a_run_is_the_textbook_recursion(order):
    """Means and densities written out again from the table's numbers, with torch's own Normal and the same draws."""
    table, denoise, x = table_of(order), toy(), noise(3, 2, 3)
    run = rollout(denoise, table, x, generator(1, "run"))
    source, clean = generator(1, "run"), []
    for k in range(len(table)):
        clean.append(denoise(x, table.timesteps[k].expand(3)))
        mean = table.cx[k] * x + table.c[k, 0] * clean[k]
        if order == 2 and k > 0:
            mean = mean + table.c[k, 1] * clean[k - 1]
        if k == len(table) - 1:
            x, expected = mean, torch.zeros(3, dtype=torch.float64)
        else:
            x = mean + table.std[k] * torch.randn(3, 2, 3, generator=source, dtype=torch.float64)
            expected = Normal(mean, table.std[k]).log_prob(x).sum((1, 2))
        assert torch.allclose(run.states[k + 1], x, atol=1e-12)
        assert torch.allclose(run.log_prob[k], expected, atol=1e-10)
        assert run.clean is not None and torch.allclose(run.clean[k], clean[k], atol=1e-12)
    assert torch.equal(run.states[0], noise(3, 2, 3))
    assert not run.states.requires_grad and not run.log_prob.requires_grad


@pytest.mark.parametrize(
    "options", [{}, {"eta": 0.0}, {"solver": "ddim"}, {"order": 3, "eta": 0.0}, {"final": "sigma_min"}]
)
@pytest.mark.parametrize("schedule", [SCHEDULE, FLOW])
def test_sample_is_the_end_of_rollout(options, schedule):
    table = step_table(schedule, 6, **options)
    end = sample(toy(), table, noise(3, 6), generator(0, "run"))
    run = rollout(toy(), table, noise(3, 6), generator(0, "run"))
    assert torch.equal(run.states[-1], end) and end.isfinite().all()
    assert torch.equal((run.log_prob != 0).all(1), table.stochastic)


def test_same_generator_same_run_bit_for_bit():
    runs = [rollout(toy(), table_of(), noise(3, 6), generator(seed, "run")) for seed in (0, 0, 1)]
    assert torch.equal(runs[0].states, runs[1].states) and torch.equal(runs[0].log_prob, runs[1].log_prob)
    assert not torch.equal(runs[0].states[1:], runs[2].states[1:])


def test_a_sample_does_not_depend_on_its_batch_mates():
    """Same draws for the same generators; only the matrix product's rounding changes with the batch."""
    sources = lambda *ids: [generator(0, "run", i) for i in ids]  # noqa: E731
    x, table = noise(4, 6), table_of()
    whole = rollout(toy(), table, x, sources(0, 1, 2, 3))
    part = rollout(toy(), table, x[[3, 1]], sources(3, 1))
    assert torch.allclose(part.states, whole.states[:, [3, 1]], atol=1e-12)
    assert torch.allclose(part.log_prob, whole.log_prob[:, [3, 1]], atol=1e-9)
    assert torch.equal(draw_noise(sources(3, 1), x[:2]), draw_noise(sources(0, 1, 2, 3), x)[[3, 1]])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("history", ["recompute", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_replay_returns_the_stored_log_probs(order, history, dtype):
    """Also when states were stored rounded: the rounded state was fed back and scored."""
    denoise = toy(dtype=torch.promote_types(dtype, torch.float32))
    run = rollout(denoise, table_of(order), noise(4, 6).to(dtype), generator(0, "run"))
    assert run.states.dtype == dtype and run.log_prob.dtype == torch.promote_types(dtype, torch.float32)
    again = replay(denoise, run, history=history)
    assert again.requires_grad
    assert torch.allclose(again, run.log_prob, rtol=1e-12 if dtype == torch.float64 else 1e-5)
    assert (again[-1] == 0).all()


def test_frozen_history_has_the_same_value_and_another_gradient():
    denoise = toy()
    run = rollout(denoise, table_of(), noise(4, 6), generator(0, "run"))
    gradients = []
    for history in ("recompute", "frozen"):
        denoise.zero_grad()
        replay(denoise, run, history=history).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in denoise.parameters() if p.grad is not None]))
    cosine = torch.cosine_similarity(*gradients, dim=0)
    assert cosine < 0.99
    other = toy(1)
    assert not torch.allclose(replay(other, run, history="frozen"), replay(other, run))
    first_order = rollout(denoise, table_of(1), noise(4, 6), generator(0, "run"))
    assert torch.equal(replay(other, first_order, history="frozen"), replay(other, first_order))


def test_replay_gradient_is_that_of_finite_differences():
    denoise = toy()
    run = rollout(toy(1), table_of(), noise(4, 6), generator(0, "run"))
    weight = denoise.weights[1]
    (gradient,) = torch.autograd.grad(replay(denoise, run).sum(), weight)
    ends = []
    for h in (1e-5, -2e-5):
        with torch.no_grad():
            weight[2, 3] += h
            ends.append(replay(denoise, run).sum().item())
    assert gradient[2, 3].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_sampler_reproduces_a_known_gaussian(order, eta):
    """The mean comes out exactly, the std to second (or first) order in the step; 20 000 runs, 4.5 standard errors."""
    n, mean, std = 20_000, 0.7, 0.4
    steps = 100 if order == 1 else 30
    denoise = gaussian_denoiser(SCHEDULE, scalar(mean), scalar(std))
    table = table_of(order, steps, eta=eta, spacing="lu", final="sigma_min")
    start = SCHEDULE.alpha(999.0) * (mean + std * noise(n, 1)) + SCHEDULE.sigma(999.0) * noise(n, 1, seed=1)
    x = sample(denoise, table, start, generator(0, "run") if eta else None)
    assert abs(x.mean() - mean) < 4.5 * std / math.sqrt(n) + 1e-3
    assert abs(x.std() - std) < 4.5 * std / math.sqrt(2 * n) + (0.05 if order == 1 else 0.02) * std


def test_importance_weights_along_a_run_average_to_one():
    """E_p[q(path) / p(path)] = 1, whatever the two denoisers; 40 000 runs, 4.5 standard errors."""
    n = 40_000
    p, q = (gaussian_denoiser(SCHEDULE, scalar(mean), scalar(0.8)) for mean in (0.0, 0.15))
    run = rollout(p, table_of(2, 8), noise(n, 2), generator(0, "run"))
    weight = (replay(q, run) - run.log_prob).sum(0).exp()
    assert 0.1 < weight.std() < 3  # they do differ
    assert abs(weight.mean() - 1) < 4.5 * weight.std() / math.sqrt(n)


@pytest.mark.parametrize("order", [1, 2])
def test_turning_space_turns_the_run(order):
    """Rotate data, start and draws: the run is rotated, and its densities are the same."""
    weights, means, stds = scalar([0.4, 0.6]), scalar([[1.0, 0.5], [-1.0, 0.2]]), scalar([0.3, 0.6])
    turn = torch.linalg.qr(noise(2, 2, seed=5)).Q
    plain = mixture_denoiser(SCHEDULE, weights, means, stds)
    turned = mixture_denoiser(SCHEDULE, weights, means @ turn, stds)
    run = rollout(plain, table_of(order), noise(50, 2), generator(0, "run"))
    again = replay(turned, replace(run, states=run.states @ turn))
    assert torch.allclose(again, run.log_prob, atol=1e-9)
    ode = table_of(order, eta=0.0)
    assert torch.allclose(sample(turned, ode, noise(50, 2) @ turn), sample(plain, ode, noise(50, 2)) @ turn, atol=1e-9)


def test_a_run_without_noise_needs_no_generator():
    table = table_of(eta=0.0)
    run = rollout(toy(), table, noise(2, 6), None)
    assert not table.stochastic.any() and (run.log_prob == 0).all()
    source = generator(0, "run")
    before = source.get_state()
    rollout(toy(), table, noise(2, 6), source)
    assert torch.equal(before, source.get_state())
    with pytest.raises(ValueError, match="no step of this table is stochastic"):
        replay(toy(), run)


def test_threshold_is_applied_before_the_prediction_enters_history():
    """The same as a denoiser that thresholds by itself."""
    clip = lambda clean: clean.clamp(-0.1, 0.1)  # noqa: E731
    inside = rollout(lambda x, t: clip(toy()(x, t)), table_of(), noise(2, 6), generator(0, "run"))
    outside = rollout(toy(), table_of(), noise(2, 6), generator(0, "run"), threshold=clip)
    assert torch.equal(inside.states, outside.states) and outside.clean is not None and outside.clean.abs().max() == 0.1
    assert torch.equal(sample(toy(), table_of(), noise(2, 6), generator(0, "run"), threshold=clip), outside.states[-1])


def test_refusals():
    x, table = noise(3, 6), table_of()
    with pytest.raises(ValueError, match="give a torch.Generator"):
        rollout(toy(), table, x, None)
    with pytest.raises(ValueError, match="got 2 generators for 3 samples"):
        rollout(toy(), table, x, [generator(0, "run", i) for i in range(2)])
    with pytest.raises(ValueError, match="shapes must be equal"):
        rollout(lambda x, t: x[:, :1], table, x, generator(0, "run"))
    run = rollout(toy(), table, x, generator(0, "run"))
    with pytest.raises(ValueError, match="unknown history 'stale'"):
        replay(toy(), run, history="stale")
    with pytest.raises(ValueError, match="clean is None"):
        replay(toy(), replace(run, clean=None), history="frozen")


def test_a_trajectory_refuses_lengths_that_disagree():
    run = rollout(toy(), table_of(), noise(3, 6), generator(0, "run"))
    replace(run, seeds=[4, 5, 6], parents=torch.tensor([0, 0, 1]))
    assert run.clean is not None
    for wrong in ({"states": run.states[1:]}, {"log_prob": run.log_prob.T}, {"clean": run.clean[1:]}, {"seeds": [1]},
                  {"parents": torch.zeros(4)}):  # fmt: skip
        with pytest.raises(ValueError):
            replace(run, **wrong)
    assert isinstance(run, Trajectory)
