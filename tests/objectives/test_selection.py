import itertools
import math

import pytest
import torch
from helpers_objectives import draw, tensor

from diffusion_align.objectives import best_and_worst, clear_win, d3po, ordered_pairs, pareto, softmax_gap, win_counts


def test_best_and_worst_by_hand():
    scores = torch.stack([tensor(0.1, 0.9, -2.0, 0.3), tensor(5, 5, 5, 5), tensor(1, 2, 2, 1)])
    win, lose, decided = best_and_worst(scores)
    assert win.tolist()[0] == 1 and lose.tolist()[0] == 2 and decided.tolist() == [True, False, True]
    assert (win[2].item(), lose[2].item()) == (1, 0)  # of equals the first


def test_best_and_worst_against_sorting():
    scores = draw(50, 4)
    win, lose, decided = best_and_worst(scores)
    order = scores.sort(1).indices
    assert torch.equal(win, order[:, -1]) and torch.equal(lose, order[:, 0]) and decided.all()


def test_a_nan_leaves_its_group_undecided():
    scores = draw(3, 4)
    scores[1, 2] = math.nan
    assert best_and_worst(scores)[2].tolist() == [True, False, True]


def test_a_tie_moves_nothing():
    """A group without a preference has no pairs, so nothing of it reaches the loss."""
    scores = torch.stack([tensor(0.5, 0.5), tensor(0.1, 0.7)])
    group, win, lose = ordered_pairs(scores)
    q = (0.01 * draw(2, 2)).requires_grad_()
    d3po(q[group, win], q[group, lose], 0.1, 0.1).sum().backward()
    assert q.grad is not None and (q.grad[0] == 0).all() and q.grad[1, 1] < 0 < q.grad[1, 0]


def test_all_pairs_of_seven():
    """The 21 pairs of D3PO's run with human feedback."""
    scores = draw(7)
    win, lose = ordered_pairs(scores)
    assert len(win) == 21 and (scores[win] > scores[lose]).all()
    assert {frozenset(p) for p in zip(win.tolist(), lose.tolist(), strict=True)} == {
        frozenset(p) for p in itertools.combinations(range(7), 2)
    }


def test_ordered_pairs_of_groups_against_loops():
    scores = draw(5, 4).round()
    expected = [(g, i, j) for g in range(5) for i in range(4) for j in range(4) if scores[g, i] > scores[g, j]]
    assert list(zip(*(index.tolist() for index in ordered_pairs(scores)), strict=True)) == expected
    assert len(expected) < 5 * 6  # some tied
    assert [len(index) for index in ordered_pairs(torch.ones(2, 3))] == [0, 0, 0]


def test_softmax_gap_is_the_difference_of_softmax_probabilities():
    first, second = 3 * draw(20), 3 * draw(20, seed=1)
    p = torch.stack([first, second]).softmax(0)
    assert torch.allclose(softmax_gap(first, second), p[0] - p[1], atol=1e-14)


def test_thresholds_of_spo():
    """tanh(x / 2) = 0.3 at x = 2 atanh 0.3 = 0.61904, 0.4 at 0.84730."""
    for threshold, gap in ((0.3, 0.61904), (0.4, 0.84730)):
        scores = tensor(1 + gap + 1e-4, 1 + gap - 1e-4, 1, 0)
        assert clear_win(scores, torch.ones(4).double(), threshold).tolist() == [True, False, False, False]
    assert clear_win(tensor(1, 1), tensor(0.99, 1), 0.0).tolist() == [True, False]


def test_pareto_by_hand():
    first = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0], [2.0, 2.0, 1.0, 1.0, 0.0]])
    second = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 2.0, 1.0]])
    assert pareto(first, second).tolist() == [1, 1, 0, -1, 0]
    assert torch.equal(pareto(second, first), -pareto(first, second))
    one, other = draw(1, 9), draw(1, 9, seed=1)
    assert torch.equal(pareto(one, other), (one - other).sign()[0].long())  # one reward: simply the larger


def test_pareto_never_prefers_what_some_weighting_would_not():
    first, second = draw(3, 200), draw(3, 200, seed=1)
    label = pareto(first, second)
    assert {-1, 0, 1} == set(label.tolist())
    weights = torch.rand(3, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gap = weights.T @ (first - second)
    assert (gap[:, label == 1] > 0).all() and (gap[:, label == -1] < 0).all()


def test_win_counts_by_hand():
    """Two scorers, three pictures. The first ranks them 3, 1, 2 wins 2, 0, 1; the second ties the first two above the
    third: 1, 1, 0. Sums 3, 1, 1 over 2 * 2."""
    rewards = torch.stack([tensor(9, 1, 5)[None], tensor(0.2, 0.2, 0.1)[None]])
    assert win_counts(rewards).tolist() == [[0.75, 0.25, 0.25]]


def test_win_counts_against_loops():
    rewards = (2 * draw(5, 3, 4)).round()
    phi = win_counts(rewards)
    for g in range(3):
        for i in range(4):
            wins = sum(bool(rewards[m, g, i] > rewards[m, g, j]) for m in range(5) for j in range(4) if j != i)
            assert phi[g, i].item() == pytest.approx(wins / 15, abs=1e-15)
    assert (phi.sum(1) < 2).any() and (phi.sum(1) <= 2).all()  # K / 2 without ties
    untied = win_counts(draw(5, 3, 4))
    assert torch.allclose(untied.sum(1), torch.full((3,), 2.0, dtype=torch.float64))
    # Each scorer counts by order alone.
    assert torch.equal(win_counts(torch.stack([rewards[0], 100 + rewards[1].exp()])), win_counts(rewards[:2]))


def test_nothing_takes_a_gradient():
    x, y = draw(2, 3).requires_grad_(), draw(2, 3, seed=1).requires_grad_()
    results = [*best_and_worst(x), *ordered_pairs(x), softmax_gap(x, y), clear_win(x, y, 0.1), pareto(x, y)]
    results.append(win_counts(draw(2, 3, 4).requires_grad_()))
    assert not any(each.requires_grad for each in results)


def test_refusals():
    for scores in (torch.zeros(3), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match=r"\[G,K\]"):
            best_and_worst(scores)
    with pytest.raises(ValueError, match=r"\[K\] or \[G,K\]"):
        ordered_pairs(torch.zeros(2, 2, 2))
    for call in (softmax_gap, lambda a, b: clear_win(a, b, 0.3), pareto):
        with pytest.raises(ValueError, match="shapes must be equal"):
            call(torch.zeros(3), torch.zeros(3, 1))
    for threshold in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            clear_win(torch.zeros(3), torch.zeros(3), threshold)
    with pytest.raises(ValueError, match=r"\[M,...\]"):
        pareto(torch.zeros(0, 3), torch.zeros(0, 3))
    for rewards in (torch.zeros(2, 3), torch.zeros(2, 3, 1), torch.zeros(0, 3, 2)):
        with pytest.raises(ValueError, match=r"\[M,G,K\]"):
            win_counts(rewards)
