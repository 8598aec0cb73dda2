import math

import numpy as np
import pytest
import torch
from helpers_objectives import draw, gradient, tensor

from diffusion_align.objectives import group_advantage, ppo_clip


@pytest.mark.parametrize("shape", [(20,), (4, 20)])
@pytest.mark.parametrize("clip", [1e-4, 0.2])
def test_loss_against_the_printed_formula(shape, clip):
    log_ratio, advantage = 2 * clip * draw(*shape, seed=1), draw(*shape, seed=2)
    ratio, a = np.exp(log_ratio.numpy()), advantage.numpy()
    expected = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - clip, 1 + clip))
    assert np.allclose(ppo_clip(log_ratio, advantage, clip).numpy(), expected, rtol=1e-12)


def test_gradient_by_hand():
    """Slopes in the log-ratio, clip 0.2, A = +-2: -A rho where the clip does not bind, else 0. rho = 1, 1.5, 0.5."""
    log_ratio = tensor(1, 1.5, 0.5, 1, 1.5, 0.5).log().requires_grad_()
    advantage = tensor(2, 2, 2, -2, -2, -2)
    loss = ppo_clip(log_ratio, advantage, 0.2)
    assert loss.tolist() == pytest.approx([-2, -2.4, -1, 2, 3, 1.6])
    assert gradient(loss, log_ratio)[0].tolist() == pytest.approx([-2, 0, -1, 2, 3, 0])


def test_at_the_old_policy_it_is_reinforce():
    log_ratio = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    advantage = draw(7)
    assert torch.allclose(gradient(ppo_clip(log_ratio, advantage, 1e-4), log_ratio)[0], -advantage, atol=1e-15)


def test_importance_weights_make_it_unbiased():
    """Actions drawn from old: the mean of -rho A has the gradient of -E_theta[A], enumerated over five actions."""
    old, advantage = draw(5).softmax(0), draw(5, seed=1)
    logits = (old.log() + 0.01 * draw(5, seed=2)).requires_grad_()
    surrogate = (old * ppo_clip(logits.log_softmax(0) - old.log(), advantage, 0.5)).sum()
    exact = -(logits.softmax(0) * advantage).sum()
    assert torch.allclose(*(torch.autograd.grad(each, logits)[0] for each in (surrogate, exact)), atol=1e-12)


def test_far_out():
    """exp(1e4) is inf; a clipped side must not turn it into nan. A bad step that became likely has no bound: inf."""
    log_ratio = torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4, -1e4], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, -1.0])
    loss = ppo_clip(log_ratio, advantage, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 0, 0, 0, 0, 0.8])
    assert gradient(loss, log_ratio)[0].tolist() == [0.0] * 6
    assert ppo_clip(torch.tensor([89.0]), torch.tensor([-1.0]), 0.2).item() == math.inf


def test_advantage_by_hand():
    """Rewards 1, 2, 6: mean 3, population variance (4 + 1 + 9) / 3, std 2.160247. The others' means: 4, 3.5, 1.5."""
    reward = tensor(1, 2, 6)[None]
    assert group_advantage(reward, "none").tolist() == [[-2, -1, 3]]
    assert group_advantage(reward, "none", leave_one_out=True)[0].tolist() == pytest.approx([-3, -1.5, 4.5])
    expected = [-0.925820, -0.462910, 1.388730]
    assert group_advantage(reward, "group", 1e-9)[0].tolist() == pytest.approx(expected, abs=1e-6)
    halved = group_advantage(reward, "group", 14**0.5 / 3**0.5)  # eps as large as the std
    assert halved[0].tolist() == pytest.approx([x / 2 for x in expected], abs=1e-6)


def test_advantage_against_numpy():
    reward = draw(4, 6) * tensor(1, 2, 3, 4)[:, None] + draw(4, 1, seed=1)
    r = reward.numpy()
    centred = r - r.mean(1, keepdims=True)
    others = np.array([[r[g, k] - np.delete(r[g], k).mean() for k in range(6)] for g in range(4)])
    assert np.allclose(group_advantage(reward, eps=1e-3).numpy(), centred / (r.std(1, keepdims=True) + 1e-3))
    assert np.allclose(group_advantage(reward, "global", 1e-3).numpy(), centred / (r.std() + 1e-3))
    assert np.allclose(group_advantage(reward, "none", leave_one_out=True).numpy(), others)
    assert group_advantage(reward).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_a_group_without_spread_gives_0(std):
    """In float32 the mean of seven 0.1 is not 0.1; over a spread of 0 the difference would come out as a preference."""
    reward = torch.stack([torch.full((7,), 0.1), torch.arange(7.0)])
    advantage = group_advantage(reward, std)
    assert (advantage[0] == 0).all() and (advantage[1, 1:] > advantage[1, :-1]).all()
    assert (group_advantage(reward[:1], std) == 0).all()


def test_advantages_take_no_gradient():
    reward = draw(2, 3).requires_grad_()
    assert not group_advantage(reward).requires_grad
    log_ratio = draw(2, 3).requires_grad_()
    loss = ppo_clip(log_ratio, reward, 0.2).sum()
    assert torch.autograd.grad(loss, reward, allow_unused=True) == (None,)


def test_refusals():
    flat = torch.zeros(4)
    with pytest.raises(ValueError, match="shapes must be equal"):
        ppo_clip(flat, flat[:, None], 0.2)
    for clip in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="clip"):
            ppo_clip(flat, flat, clip)
    with pytest.raises(TypeError, match="clip"):
        ppo_clip(flat, flat)  # type: ignore[call-arg]
    for reward in (flat, flat[:, None]):
        with pytest.raises(ValueError, match=r"\[G,K\]"):
            group_advantage(reward)
    with pytest.raises(ValueError, match="std"):
        group_advantage(flat[None], "batch")
    with pytest.raises(ValueError, match="eps"):
        group_advantage(flat[None], eps=0.0)
