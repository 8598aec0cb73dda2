import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers_objectives import draw, gradient, tensor

from diffusion_align.objectives import prdp, prdp_clip_fraction

G, K, T = 3, 5, 4
BETA = 0.7


def runs(seed=0, ties=False):
    """Log-ratios of now and of the snapshot [G,K,T], rewards [G,K]."""
    reward = draw(G, K, seed=seed + 2)
    if ties:
        reward = reward.round()
    return draw(G, K, T, seed=seed), draw(G, K, T, seed=seed + 1), reward


def brute_force(log_ratio, log_ratio_old, reward, beta, clip):
    """[G] by loops over the paper's equations."""
    out = []
    for now, old, r in zip(log_ratio.numpy(), log_ratio_old.numpy(), reward.numpy(), strict=True):
        held = now if clip is None else np.clip(now, old - clip, old + clip)
        losses = []
        for i in range(len(r)):
            for j in range(len(r)):
                if r[i] > r[j]:
                    target = (r[i] - r[j]) / beta
                    plain = (sum(now[i]) - sum(now[j]) - target) ** 2
                    losses.append(max(plain, (sum(held[i]) - sum(held[j]) - target) ** 2))
        out.append(sum(losses) / len(losses) if losses else 0.0)
    return np.array(out)


@pytest.mark.parametrize("clip", [None, 0.05, 0.5, 3.0])
@pytest.mark.parametrize("ties", [False, True])
def test_loss_against_loops(clip, ties):
    now, old, reward = runs(ties=ties)
    assert ties == bool((reward.sort(1).values.diff(dim=1) == 0).any())
    expected = brute_force(now, old, reward, BETA, clip)
    assert np.allclose(prdp(now, old, reward, BETA, clip).numpy(), expected, rtol=1e-12)


def test_by_hand():
    """Three runs of two steps, R = 0.3, 0.5, -0.1, rewards 1, 0.5, 0, beta 2, so r/beta = 0.5, 0.25, 0. Residuals -0.2,
    0.25, -0.1; differences -0.45, -0.1, 0.35, squares 0.2025, 0.01, 0.1225, mean 0.111667. Twice the variance: mean
    -1/60, deviations -.183333, .266667, -.083333, squares .033611 + .071111 + .006944 = .111667, over 2, times 2.
    """
    now = torch.tensor([[[0.1, 0.2], [0.6, -0.1], [0.0, -0.1]]], dtype=torch.float64)
    reward = tensor(1, 0.5, 0)[None]
    assert prdp(now, torch.zeros_like(now), reward, 2.0, None).item() == pytest.approx(0.335 / 3, abs=1e-12)
    # Held to +-0.15: R = 0.1 + 0.15, 0.15 - 0.1, -0.1; residuals -0.25, -0.2, -0.1; squares 0.0025, 0.0225, 0.01.
    # The larger of each: 0.2025, 0.0225, 0.1225 for the pairs 01, 02, 12.
    clipped = prdp(now, torch.zeros_like(now), reward, 2.0, 0.15)
    assert clipped.item() == pytest.approx((0.2025 + 0.0225 + 0.1225) / 3, abs=1e-12)
    assert prdp_clip_fraction(now, torch.zeros_like(now), 0.15).item() == pytest.approx(2 / 6)


def test_without_clip_or_ties_it_is_twice_the_variance():
    now, old, reward = runs()
    expected = 2 * np.var((now.sum(2) - reward / BETA).numpy(), axis=1, ddof=1)
    assert np.allclose(prdp(now, old, reward, BETA, None).numpy(), expected, rtol=1e-12)
    # The pair form, reached through a clip that never binds, agrees in its gradient too.
    now.requires_grad_()
    slopes = [gradient(prdp(now, old, reward, BETA, clip), now)[0] for clip in (None, 1e6)]
    assert torch.allclose(*slopes, atol=1e-12)


def test_a_batch_may_mix_groups_with_and_without_ties():
    now, old, reward = runs()
    reward[1, 0] = reward[1, 3]
    now.requires_grad_()
    loss = prdp(now, old, reward, BETA, None)
    assert np.allclose(loss.detach().numpy(), brute_force(now.detach(), old, reward, BETA, None), rtol=1e-12)
    for g in range(G):
        alone = prdp(now[g : g + 1], old[g : g + 1], reward[g : g + 1], BETA, None)
        assert torch.allclose(gradient(loss[g], now)[0], gradient(alone, now)[0], atol=1e-12)


def test_at_the_reference_it_is_the_mean_squared_target():
    _, _, reward = runs()
    zero = torch.zeros(G, K, T, dtype=torch.float64)
    gaps = [[((r[i] - r[j]) / BETA) ** 2 for i in range(K) for j in range(K) if r[i] > r[j]] for r in reward.tolist()]
    for clip in (None, 0.1):
        value = prdp(zero, zero, reward, BETA, clip)
        assert value.tolist() == pytest.approx([sum(g) / len(g) for g in gaps], rel=1e-12)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_gradient_at_the_reference_is_group_centred_reinforce(clip):
    """-(2 K / (|P| beta)) sum (r_k - mean r) grad R_k, |P| = K (K - 1) / 2: for each step of run k, and no other."""
    _, _, reward = runs()
    now = torch.zeros(G, K, T, dtype=torch.float64, requires_grad=True)
    slope = gradient(prdp(now, now.detach(), reward, BETA, clip), now)[0]
    centred = reward - reward.mean(1, keepdim=True)
    expected = -(2 * K / (K * (K - 1) / 2) / BETA) * centred[:, :, None].expand(G, K, T)
    assert torch.allclose(slope, expected, atol=1e-12)


def test_it_is_0_where_log_ratios_are_rewards_over_beta_up_to_a_constant():
    _, old, reward = runs()
    now = ((reward / BETA + draw(G, 1, seed=9)) / T)[:, :, None].expand(G, K, T)
    assert prdp(now, old, reward, BETA, None).abs().max() < 1e-24


@pytest.mark.parametrize("clip", [None, 0.1])
def test_an_all_tied_group_gives_0_and_a_finite_zero_gradient(clip):
    now, old, reward = runs()
    reward[0] = 0.3
    now.requires_grad_()
    loss = prdp(now, old, reward, BETA, clip)
    slope = gradient(loss, now)[0]
    assert loss[0] == 0 and (loss[1:] > 0).all() and (slope[0] == 0).all() and slope.isfinite().all()


def test_where_the_clip_stops_a_step():
    """One pair, one step; the winner's log-ratio should rise. Old log-ratios 0, clip 0.1, target gap 1.

    Inside: slope of the plain loss, 2 (rho - 1). Beyond the clip towards the target: the held residual, 0.1 - 1, is the
    larger one, and has no gradient. Beyond it, away: the plain residual, -0.3 - 1, is larger, and pulls back.
    """
    reward, old = tensor(1, 0)[None], torch.zeros(1, 2, 1, dtype=torch.float64)
    for rho, loss, slope in ((0.05, 0.95**2, -1.9), (0.3, 0.9**2, 0.0), (-0.3, 1.3**2, -2.6)):
        now = torch.tensor([[[rho], [0.0]]], dtype=torch.float64, requires_grad=True)
        value = prdp(now, old, reward, 1.0, 0.1)
        assert value.item() == pytest.approx(loss, abs=1e-12)
        assert gradient(value, now)[0][0, 0, 0].item() == pytest.approx(slope, abs=1e-12)
        assert prdp_clip_fraction(now, old, 0.1).item() == (0.5 if abs(rho) > 0.1 else 0.0)


def test_the_clip_is_around_the_old_log_ratio_step_by_step():
    """Steps 0.25 and 0.05 about old 0.2 and 0.2: the second is held at 0.1. R = 0.30 and 0.35; target 1."""
    now = torch.tensor([[[0.25, 0.05], [0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[[0.2, 0.2], [0.0, 0.0]]], dtype=torch.float64)
    loss = prdp(now, old, tensor(1, 0)[None], 1.0, 0.1)
    assert loss.item() == pytest.approx(0.7**2, abs=1e-12)  # the second step has moved away: the plain residual counts
    assert gradient(loss, now)[0][0, 0].tolist() == pytest.approx([-1.4, -1.4])


def test_means_over_steps_and_dims_are_the_sum_with_other_constants():
    """The published form, with means over D dims and T steps, written out here; ours with beta / (T D) and clip D."""
    now, old, reward = runs(ties=True)
    dims, clip = 7, 0.02
    held = np.clip(now.numpy() / dims, old.numpy() / dims - clip, old.numpy() / dims + clip)
    for use_clip in (None, clip):
        published = []
        for g in range(G):
            r, plain, hold = reward[g].numpy(), now[g].numpy().mean(1) / dims, held[g].mean(1)
            gaps = [(i, j, (r[i] - r[j]) / BETA) for i in range(K) for j in range(K) if r[i] > r[j]]
            squares = [[(m[i] - m[j] - target) ** 2 for i, j, target in gaps] for m in (plain, hold)]
            published.append(np.mean(squares[0] if use_clip is None else np.maximum(*squares)))
        ours = prdp(now, old, reward, BETA / (T * dims), None if use_clip is None else clip * dims)
        assert np.allclose(ours.numpy() / (T * dims) ** 2, published, rtol=1e-12)


def test_float32_at_published_constants_keeps_small_log_ratios():
    """Rewards near 0.27 over beta 3e-5 are 9000 apart from log-ratios of 1e-4; their mean must go first."""
    reward = 0.27 + 1e-6 * draw(2, 4)
    now = 1e-2 * draw(2, 4, 3, seed=1)
    exact = prdp(now, now, reward, 3e-5, None)
    narrow = prdp(now.float(), now.float(), reward, 3e-5, None)
    assert narrow.dtype == torch.float32 and torch.allclose(narrow.double(), exact, rtol=1e-5)


def test_only_the_policy_takes_a_gradient():
    now, old, reward = (x.requires_grad_() for x in runs())
    for clip in (None, 0.1):
        loss = prdp(now, old, reward, BETA, clip).sum()
        slopes = torch.autograd.grad(loss, (now, old, reward), allow_unused=True)
        assert slopes[0] is not None and slopes[1:] == (None, None)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_nan_is_seen(clip):
    now, old, reward = runs()
    reward[1, 2] = math.nan
    loss = prdp(now, old, reward, BETA, clip)
    assert loss.isnan().tolist() == [False, True, False]


def test_refusals():
    now, old, reward = runs()
    with pytest.raises(ValueError, match="shapes must be equal"):
        prdp(now, old[:, :, :1], reward, 1.0, None)
    with pytest.raises(ValueError, match=r"\[G,K,T\]"):
        prdp(now[0], old[0], reward[0], 1.0, None)
    with pytest.raises(ValueError, match="expected rewards"):
        prdp(now, old, reward[:, :1], 1.0, None)
    with pytest.raises(ValueError, match="K >= 2"):
        prdp(now[:, :1], old[:, :1], reward[:, :1], 1.0, None)
    for beta in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="beta"):
            prdp(now, old, reward, beta, None)
    for call in (lambda: prdp(now, old, reward, 1.0, 0.0), lambda: prdp_clip_fraction(now, old, -1.0)):
        with pytest.raises(ValueError, match="clip"):
            call()
    with pytest.raises(TypeError, match="clip"):
        prdp(now, old, reward, 1.0)  # type: ignore[call-arg]


PUBLISHED = [
    pytest.param(beta, clip, dims, id=f"{size}-{dims}")
    for size, beta, clip in (("small", 3e-5, 1e-6), ("large", 3e-6, 1e-4))  # arXiv 2402.08714, section 5
    for dims in (4 * 64 * 64, 4 * 128 * 128)  # Stable Diffusion 1.5 and SDXL
]
RUNS, STEPS = 16, 50


def exactly(now, old, reward, beta, clip):
    """The loss of one group and its gradient [K,T], in rational numbers from the float32 ones that go in."""
    now, old = ([[Fraction(v) for v in run] for run in side.tolist()] for side in (now, old))
    reward, beta, clip = [Fraction(r) for r in reward.tolist()], Fraction(beta), Fraction(clip)
    rows = [list(zip(*pair, strict=True)) for pair in zip(now, old, strict=True)]
    held = [[min(max(v, o - clip), o + clip) for v, o in row] for row in rows]
    inside = [[abs(v - o) <= clip for v, o in row] for row in rows]
    total, total_held = [sum(run) for run in now], [sum(run) for run in held]
    loss, count = Fraction(0), 0
    plain, clipped = [Fraction(0)] * len(now), [Fraction(0)] * len(now)  # slopes of a run's steps; if inside the clip
    for i, j in ((i, j) for i in range(len(now)) for j in range(len(now)) if reward[i] > reward[j]):
        count += 1
        gap, gap_held = (t[i] - t[j] - (reward[i] - reward[j]) / beta for t in (total, total_held))
        slopes, gap = (plain, gap) if gap**2 >= gap_held**2 else (clipped, gap_held)
        loss += gap**2
        slopes[i] += 2 * gap
        slopes[j] -= 2 * gap
    slope = [
        [float((p + c * within) / count) for within in row] for p, c, row in zip(plain, clipped, inside, strict=True)
    ]
    return float(loss / count), torch.tensor(slope, dtype=torch.float64)


def published_runs(clip, moved):
    """Float32 log-ratios now and then [1,K,T] and rewards [1,K]; `moved` is a factor on the clip for each run [K]."""
    old = (clip * draw(RUNS, STEPS, seed=3)).float()
    reward = (0.27 + 0.02 * draw(RUNS, seed=4)).float()
    # Ranks, so that the better run of every pair has moved further up, and no two runs alike.
    rank = (reward.argsort().argsort().double() - (RUNS - 1) / 2)[:, None]
    now = (old + clip * moved(rank).expand(RUNS, STEPS)).float()
    return now[None].requires_grad_(), old[None], reward[None]


MOVES = {
    "tied": lambda rank: 0 * rank,
    "towards": lambda rank: rank.sign() * (1.5 + 0.1 * rank.abs()),
    "away": lambda rank: -rank.sign() * (1.5 + 0.1 * rank.abs()),
    "inside": lambda rank: 0.1 * rank,
    "mixed": lambda rank: 1.5 * draw(RUNS, STEPS, seed=5),
}


@pytest.mark.parametrize("moved", MOVES)
@pytest.mark.parametrize(("beta", "clip", "dims"), PUBLISHED)
def test_at_published_constants_float32_inputs_give_the_exact_loss_and_gradient(beta, clip, dims, moved):
    """Targets are 1e9 nats and more, where one step of float32 is 64 nats or more, and the clip 0.016 to 6.6."""
    beta, clip = beta / (STEPS * dims), clip * dims
    now, old, reward = published_runs(clip, MOVES[moved])
    loss = prdp(now, old, reward, beta, clip)
    slope = gradient(loss, now)[0]
    expected, exact = exactly(now[0].detach(), old[0], reward[0], beta, clip)
    assert loss.dtype == slope.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # A slope is a sum over 15 pairs, each to about 2^-53 of the largest target, and is rounded to float32 once.
    bound = 1e-6 * exact.abs() + 1e-9 * exact.abs().max()
    assert ((slope[0].double() - exact).abs() <= bound).all()
    full = gradient(prdp(now, old, reward, beta, None), now)[0]
    if moved == "towards":
        assert (slope == 0).all() and prdp_clip_fraction(now, old, clip).item() == 1
    elif moved != "mixed":  # pulled back with the whole gradient, or not held at all
        assert full.abs().min() > 0 and torch.allclose(slope, full, rtol=1e-6)
