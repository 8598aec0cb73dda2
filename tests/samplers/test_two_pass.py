import math
from dataclasses import replace

import pytest
import torch
from helpers_samplers import noise
from helpers_two_pass import SCHEDULE, STEPS, gradients, setting, textbook_log_prob, toy

from diffusion_align.gaussian import Gaussian
from diffusion_align.objectives import logistic
from diffusion_align.rng import generator
from diffusion_align.samplers import path_gradient, replay, rollout, step_gaussian, step_table


def dpo_over_paths(run, reference):
    def loss(log_prob):
        winner, loser = (log_prob - reference).sum(0).chunk(2)
        return logistic(winner - loser, beta=0.05).mean()

    return loss


def clipped_ratios(run, reference):
    """PPO's clipped surrogate per step (Schulman et al. 2017, arXiv 1707.06347, eq. 7)."""
    advantage = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.3, -2.0], dtype=torch.float64)

    def loss(log_prob):
        ratio = (log_prob - run.log_prob).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage).mean()

    return loss


def squared_pair_residual(run, reference):
    """Log-ratios of all runs coupled with one another: every prediction's vector depends on every other."""

    def loss(log_prob):
        ratio = (log_prob - run.log_prob).clamp(-0.5, 0.5).sum(0)
        return (ratio[:, None] - ratio[None] - 0.3).square().sum()

    return loss


@pytest.mark.parametrize("make_loss", [dpo_over_paths, clipped_ratios, squared_pair_residual])
@pytest.mark.parametrize("scale", [None, 5.0])
@pytest.mark.parametrize("order", [1, 2])
def test_equal_to_full_autograd(order, scale, make_loss):
    network, denoise, run, reference = setting(order, scale)
    loss = make_loss(run, reference)
    full = loss(textbook_log_prob(denoise, run))
    full.backward()
    expected = gradients(network)
    network.zero_grad()
    value = path_gradient(denoise, run, loss)
    assert not value.requires_grad
    assert value.item() == pytest.approx(full.item(), rel=1e-12)
    assert expected.norm() > 1e-4
    assert (gradients(network) - expected).norm() < 1e-12 * expected.norm()


def test_some_ratios_are_clipped_and_some_are_not():
    _, denoise, run, _ = setting()
    ratio = (replay(denoise, run) - run.log_prob)[:-1].exp()
    outside = ((ratio - 1).abs() > 0.1).double().mean()
    assert 0.1 < outside < 0.9


@pytest.mark.parametrize(
    "options", [{"solver": "ddim", "eta": 0.6}, {"final": "sigma_min"}, {"eta": 0.4, "variant": "heun"}]
)
@pytest.mark.parametrize("history", ["recompute", "frozen"])
def test_equal_to_autograd_of_replay_on_other_tables(options, history):
    network, denoise, run, reference = setting(**options)
    loss = dpo_over_paths(run, reference)
    loss(replay(denoise, run, history=history)).backward()
    expected = gradients(network)
    network.zero_grad()
    path_gradient(denoise, run, loss, history=history)
    assert (gradients(network) - expected).norm() < 1e-12 * expected.norm()


def test_finite_difference_of_one_weight():
    network, denoise, run, reference = setting()
    loss = dpo_over_paths(run, reference)
    path_gradient(denoise, run, loss)
    weight, ends = network.weights[1], []
    assert weight.grad is not None
    for h in (1e-5, -2e-5):
        with torch.no_grad():
            weight[3, 4] += h
            ends.append(loss(replay(denoise, run)).item())
    assert weight.grad[3, 4].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_gradients_accumulate():
    network, denoise, run, reference = setting()
    loss = dpo_over_paths(run, reference)
    path_gradient(denoise, run, loss)
    once = gradients(network)
    path_gradient(denoise, run, lambda log_prob: 0.5 * loss(log_prob))
    assert torch.allclose(gradients(network), 1.5 * once, rtol=1e-12)


def test_a_step_down_raises_the_winners():
    network, denoise, run, reference = setting()

    def margin():
        with torch.no_grad():
            winner, loser = replay(denoise, run).sum(0).chunk(2)
        return (winner - loser).mean().item()

    before = margin()
    path_gradient(denoise, run, dpo_over_paths(run, reference))
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    assert margin() > before


def test_works_under_no_grad_and_leaves_states_alone():
    network, denoise, run, reference = setting()
    with torch.no_grad():
        path_gradient(denoise, run, dpo_over_paths(run, reference))
    assert gradients(network).norm() > 0 and run.states.grad is None and not run.states.requires_grad


def test_the_network_runs_only_where_it_is_scored():
    """Seven steps, the last deterministic: six predictions in each pass, never the last."""
    _, denoise, run, reference = setting()
    times = []

    def counting(x, t):
        times.append(t[0].item())
        return denoise(x, t)

    path_gradient(counting, run, dpo_over_paths(run, reference))
    assert times == run.table.timesteps[:-1].tolist() * 2


def test_refuses_passes_that_disagree():
    network, denoise, run, reference = setting()
    source = torch.Generator().manual_seed(0)

    def dropout(x, t):
        return denoise(x, t) * torch.bernoulli(torch.full_like(x, 0.9), generator=source) / 0.9

    with pytest.raises(RuntimeError, match="two passes of the denoiser differ at step 0"):
        path_gradient(dropout, run, dpo_over_paths(run, reference))
    calls = []

    def drifting(x, t):
        calls.append(t)
        return denoise(x, t) * (math.nan if len(calls) > STEPS else 1)

    network.zero_grad()
    path_gradient(
        drifting, run, dpo_over_paths(run, reference)
    )  # nothing can be said of nan, but the gradient shows it
    assert all(bool(p.grad.isnan().any()) for p in network.parameters() if p.grad is not None)


def test_a_prediction_that_is_not_finite_in_the_second_pass_only_shows_in_the_gradient():
    """Also where its row has no path back to the parameters: the others' gradient would then be finite, and wrong."""
    network, denoise, run, reference = setting()
    calls = []

    def broken(x, t):
        calls.append(t)
        out = denoise(x, t)
        return out.index_fill(0, torch.tensor([0]), math.inf) if len(calls) > STEPS else out

    path_gradient(broken, run, dpo_over_paths(run, reference))
    assert any(bool(p.grad.isnan().any()) for p in network.parameters() if p.grad is not None)


def test_a_small_disagreement_of_kernels_is_allowed_and_can_be_forbidden():
    _, denoise, run, reference = setting()
    calls = []

    def jitter(x, t):
        calls.append(t)
        return denoise(x, t) * (1 + 1e-6 * len(calls))

    path_gradient(jitter, run, dpo_over_paths(run, reference))
    with pytest.raises(RuntimeError, match="two passes"):
        path_gradient(jitter, run, dpo_over_paths(run, reference), tolerance=0.0)


def test_refusals():
    network, denoise, run, reference = setting()
    loss = dpo_over_paths(run, reference)
    with pytest.raises(ValueError, match="must be a scalar, got \\[6\\]"):
        path_gradient(denoise, run, lambda log_prob: log_prob.sum(0))
    with pytest.raises(ValueError, match="does not depend on the log-probs"):
        path_gradient(denoise, run, lambda log_prob: log_prob.detach().sum())
    with pytest.raises(ValueError, match="unknown history"):
        path_gradient(denoise, run, loss, history="stale")
    ode = step_table(SCHEDULE, STEPS, eta=0.0)
    with pytest.raises(ValueError, match="no step of this table is stochastic"):
        path_gradient(denoise, rollout(denoise, ode, noise(2, 6), None), loss)
    with pytest.raises(ValueError, match="clean is None"):
        path_gradient(denoise, replace(run, clean=None), loss, history="frozen")
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in the denoiser requires a gradient"):
        path_gradient(denoise, run, loss)


def log_ratio_to(denoise, run):
    """The fused log-ratio of a step to another denoiser's, as a measure."""
    other = [denoise(x, t.expand(len(x))).detach() for x, t in zip(run.states[:-1], run.table.timesteps, strict=True)]

    def measure(k, step, x):
        mean, std = step_gaussian(run.table, k, run.states[k], other[k], *other[max(k - 1, 0) : k])
        return step.log_ratio(Gaussian(mean, std), x)

    return measure


def test_another_measure_of_a_step_takes_the_place_of_the_log_prob():
    network, denoise, run, reference = setting(2)
    path_gradient(denoise, run, lambda log_prob: (log_prob - reference).sum(0).square().sum())
    expected = gradients(network)
    network.zero_grad()
    path_gradient(denoise, run, lambda ratio: ratio.sum(0).square().sum(), measure=log_ratio_to(toy(1), run))
    torch.testing.assert_close(gradients(network), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2])
def test_known_predictions_save_the_first_pass(order):
    network, denoise, run, reference = setting(order)
    loss = squared_pair_residual(run, reference)
    now = rollout(denoise, run.table, run.states[0], generator(0, "again"))
    path_gradient(denoise, now, loss)
    expected = gradients(network)
    network.zero_grad()
    calls = []
    path_gradient(lambda x, t: calls.append(0) or denoise(x, t), now, loss, known=now.clean)
    assert torch.equal(gradients(network), expected) and len(calls) == STEPS - 1


def test_known_predictions_of_other_weights_are_refused():
    """The check that the importance ratio is 1: the run's own predictions are no longer those of the policy."""
    network, denoise, run, reference = setting(2)
    with pytest.raises(RuntimeError, match="differ at step 0"):
        path_gradient(denoise, run, squared_pair_residual(run, reference), known=run.clean)
