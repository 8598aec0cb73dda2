"""The one-pass gradient of losses that are sums over steps, against plain autograd through everything."""

import pytest
import torch
from helpers_samplers import SD15, noise
from helpers_two_pass import STEPS, gradients, setting, textbook_log_prob

from diffusion_align.objectives import logistic
from diffusion_align.samplers import path_gradient, replay, rollout, step_gradient, step_table
from diffusion_align.schedule import Schedule


def per_step(run, reference):
    """A pair loss at each step, with weights that tell the steps apart; as one function of a step and of all."""

    def of_step(k, log_prob):
        winner, loser = (log_prob - reference[k]).chunk(2)
        return (k + 1) * logistic(winner - loser, beta=0.05).mean()

    def of_path(log_prob):
        return sum(of_step(k, row) for k, row in enumerate(log_prob) if run.table.stochastic[k])

    return lambda k, step: of_step(k, step.log_prob(run.states[k + 1])), of_path


@pytest.mark.parametrize("scale", [None, 5.0])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_equal_to_full_autograd(order, scale, final):
    network, denoise, run, reference = setting(order, scale, final=final)
    of_step, of_path = per_step(run, reference)
    full = of_path(textbook_log_prob(denoise, run))
    full.backward()
    expected = gradients(network)
    network.zero_grad()
    value = step_gradient(denoise, run, of_step)
    assert value.item() == pytest.approx(full.item(), rel=1e-12) and not value.requires_grad
    torch.testing.assert_close(gradients(network), expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_frozen_history_is_that_of_two_passes(final):
    network, denoise, run, reference = setting(2, final=final)
    of_step, of_path = per_step(run, reference)
    path_gradient(denoise, run, of_path, history="frozen")
    expected = gradients(network)
    network.zero_grad()
    step_gradient(denoise, run, of_step, history="frozen")
    torch.testing.assert_close(gradients(network), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("order", [1, 2])
def test_one_call_a_step_and_at_most_order_graphs_alive(order):
    network, denoise, run, reference = setting(order)
    of_step, _ = per_step(run, reference)
    alive, most = set(), []

    def counted(x, t):
        out = denoise(x, t)
        alive.add(id(out))
        out.register_hook(lambda gradient: alive.discard(id(out)))  # differentiated: its graph is freed
        most.append(len(alive))
        return out

    step_gradient(counted, run, of_step)
    assert len(most) == int(run.table.stochastic.sum()) == STEPS - 1
    assert max(most) == order


def test_steps_without_a_density_are_neither_called_nor_needed():
    network, denoise, run, reference = setting(1)
    seen = []
    step_gradient(denoise, run, lambda k, step: seen.append(k) or step.log_prob(run.states[k + 1]).sum())
    assert seen == list(range(STEPS - 1))


@pytest.mark.parametrize("order", [1, 2])
def test_a_step_whose_loss_asks_nothing_leaves_the_others_exact(order):
    """Clipped everywhere, say: the loss of step 2 is a constant."""
    network, denoise, run, reference = setting(order)
    of_step, _ = per_step(run, reference)

    def without_two(k, step):
        return step.mean.new_zeros(()) if k == 2 else of_step(k, step)

    def path(log_prob):
        weights = [(k + 1) * (k != 2 and bool(run.table.stochastic[k])) for k in range(STEPS)]
        halves = [(row - ref).chunk(2) for row, ref in zip(log_prob, reference, strict=True)]
        return sum(w * logistic(a - b, beta=0.05).mean() for w, (a, b) in zip(weights, halves, strict=True) if w)

    path(replay(denoise, run)).backward()
    expected = gradients(network)
    network.zero_grad()
    step_gradient(denoise, run, without_two)
    torch.testing.assert_close(gradients(network), expected, rtol=1e-11, atol=1e-12)


def test_what_is_refused():
    network, denoise, run, reference = setting(1)
    with pytest.raises(ValueError, match="scalar"):
        step_gradient(denoise, run, lambda k, step: step.log_prob(run.states[k + 1]))
    with pytest.raises(ValueError, match="nothing to train"):
        step_gradient(lambda x, t: x, run, lambda k, step: step.log_prob(run.states[k + 1]).sum())
    ode = step_table(Schedule.from_config(SD15), STEPS, eta=0.0)
    flat = rollout(lambda x, t: x, ode, noise(2, 6), None)
    with pytest.raises(ValueError, match="eta > 0"):
        step_gradient(denoise, flat, lambda k, step: step.mean.sum())
