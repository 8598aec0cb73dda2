import math

import numpy as np
import pytest
import torch
from helpers_objectives import draw, gradient, tensor

from diffusion_align import objectives
from diffusion_align.objectives import gain_weights, logistic

FOUR = tensor(1, 2 / 3, 1 / 3, 0)[None]


def rank_dpo(errors, *arguments, **options):
    """The tests speak of the paper's s, gaps of errors; the objective takes scores, which are minus those."""
    return objectives.rank_dpo(-errors, *arguments, **options)


def brute_force(scores, relevance, beta, log=math.log):
    """[B], [B] weights and [B] pairs, by loops over the paper's formula; ranks by counting."""
    losses, totals, counts = [], [], []
    for s, phi in zip(scores.tolist(), relevance.tolist(), strict=True):
        k = len(phi)
        rank = [1 + sum(phi[j] > phi[i] or (phi[j] == phi[i] and j < i) for j in range(k)) for i in range(k)]
        loss = total = count = 0.0
        for i in range(k):
            for j in range(k):
                if phi[i] > phi[j]:
                    gap = abs((2 ** phi[i] - 1) - (2 ** phi[j] - 1))
                    weight = gap * abs(1 / log(1 + rank[i]) - 1 / log(1 + rank[j]))
                    loss -= weight * math.log(1 / (1 + math.exp(beta * (s[i] - s[j]))))
                    total, count = total + weight, count + 1
        losses, totals, counts = [*losses, loss], [*totals, total], [*counts, count]
    return np.array(losses), np.array(totals), np.array(counts)


def lists(seed=0, batch=6, size=5):
    """Scores, and relevance of a few levels, so that some tie."""
    levels = torch.randint(0, 4, (batch, size), generator=torch.Generator().manual_seed(seed))
    return draw(batch, size, seed=seed), levels.double() / 3


def test_weights_by_hand():
    """phi = (1, 2/3, 1/3, 0), gains 2^phi = 2, 1.587401, 1.259921, 1, 1 / log(1 + rank) = 1.442695, .910239, .721348,
    .621335. Pair 14: 1 * .821360 = .821; 12: .412599 * .532456 = .220; and so on, 1.832 in all.
    """
    weights = gain_weights(FOUR)[0]
    expected = {(0, 1): 0.220, (0, 2): 0.534, (0, 3): 0.821, (1, 2): 0.062, (1, 3): 0.170, (2, 3): 0.026}
    for (i, j), weight in expected.items():
        assert weights[i, j].item() == pytest.approx(weight, abs=5e-4) and weights[j, i] == weights[i, j]
    assert weights.triu().sum().item() == pytest.approx(1.832, abs=5e-4)
    assert gain_weights(tensor(1, 0)[None])[0, 0, 1].item() == pytest.approx(0.532456, abs=1e-6)
    assert torch.allclose(gain_weights(FOUR, "log2")[0], math.log(2) * weights, atol=1e-12)


def test_loss_against_loops():
    scores, relevance = lists()
    for discount, log in (("ln", math.log), ("log2", math.log2)):
        loss, total, count = brute_force(scores, relevance, 0.7, log)
        assert (count < 10).any() and (count > 0).all()  # with ties among them
        for pair_norm, expected in {"sum": loss, "sum_weights": loss / total, "num_pairs": loss / count}.items():
            value = rank_dpo(scores, relevance, 0.7, pair_norm=pair_norm, discount=discount)
            assert np.allclose(value.numpy(), expected, rtol=1e-12), (pair_norm, discount)
    assert torch.equal(rank_dpo(scores, relevance, 0.7), rank_dpo(scores, relevance, 0.7, pair_norm="sum"))


def test_two_pictures_by_hand():
    """The better one's error fell by 0.5, the other's rose by 0.3, beta 2: .532456 softplus(-1.6), which is .183901."""
    loss = rank_dpo(tensor(-0.5, 0.3)[None], tensor(1, 0)[None], 2.0)
    assert loss.item() == pytest.approx(0.532456 * 0.183901, abs=1e-6)
    # The same list in the other order, and the same pair with the label against it: z = -1.6, softplus(1.6) = 1.783901.
    assert rank_dpo(tensor(0.3, -0.5)[None], tensor(0, 1)[None], 2.0).item() == pytest.approx(loss.item(), abs=1e-15)
    against = rank_dpo(tensor(-0.5, 0.3)[None], tensor(0, 1)[None], 2.0)
    assert against.item() == pytest.approx(0.532456 * 1.783901, abs=1e-6)


def test_two_pictures_are_a_weighted_pair():
    s = draw(5, 2)
    weighted = (1 / math.log(2) - 1 / math.log(3)) * logistic(s[:, 1] - s[:, 0], 3.0)
    relevance = tensor(1, 0).expand(5, 2)
    assert torch.allclose(rank_dpo(s, relevance, 3.0), weighted, atol=1e-12)
    unweighted = rank_dpo(s, relevance, 3.0, pair_norm="sum_weights")
    assert torch.allclose(unweighted, logistic(s[:, 1] - s[:, 0], 3.0), atol=1e-12)


def test_log_2_times_the_weights_at_the_reference():
    relevance = lists()[1]
    zero = torch.zeros_like(relevance)
    total = gain_weights(relevance).triu().sum((1, 2))
    assert torch.allclose(rank_dpo(zero, relevance, 5.0), math.log(2) * total, atol=1e-12)
    assert rank_dpo(zero, relevance, 5.0, pair_norm="sum_weights").tolist() == pytest.approx([math.log(2)] * 6)
    # A gap that all pictures share says nothing.
    scores = lists()[0]
    assert torch.allclose(rank_dpo(scores + 3, relevance, 5.0), rank_dpo(scores, relevance, 5.0), atol=1e-10)


def test_gradient_against_the_closed_form():
    """dL/ds_i = beta [sum_{j worse} D_ij sigmoid(beta (s_i - s_j)) - sum_{j better} D_ij sigmoid(beta (s_j - s_i))]."""
    scores, relevance = lists()
    scores.requires_grad_()
    slope = gradient(rank_dpo(scores, relevance, 0.7), scores)[0]
    weights, s = gain_weights(relevance), scores.detach()
    for b in range(6):
        for i in range(5):
            expected = 0.0
            for j in range(5):
                push = 0.7 * (s[b, i] - s[b, j])
                if relevance[b, i] > relevance[b, j]:
                    expected += 0.7 * weights[b, i, j] * torch.sigmoid(push)
                elif relevance[b, i] < relevance[b, j]:
                    expected -= 0.7 * weights[b, i, j] * torch.sigmoid(-push)
            assert slope[b, i].item() == pytest.approx(float(expected), abs=1e-12)
    assert slope.sum(1).abs().max() < 1e-12


def test_a_higher_score_is_better():
    """The contract of the name: the loss falls when the more relevant picture's score rises."""
    right, wrong = (objectives.rank_dpo(tensor(*s)[None], tensor(1, 0)[None], 2.0) for s in ((0.5, -0.3), (-0.3, 0.5)))
    # One pair with relevance 1 and 0: weight (2^1 - 2^0) (1/ln 2 - 1/ln 3) = 0.532.
    assert right.item() == pytest.approx(0.53246 * math.log1p(math.exp(-1.6)), rel=1e-4)
    assert wrong.item() == pytest.approx(0.53246 * math.log1p(math.exp(1.6)), rel=1e-4)


def test_at_the_reference_the_best_error_is_pushed_down_and_the_worst_up():
    scores = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    slope = gradient(rank_dpo(scores, FOUR, 1.0), scores)[0][0]
    assert slope[0] > 0 and slope[-1] < 0 and slope[0] == slope.max() and slope[-1] == slope.min()


def test_the_order_of_the_list_does_not_matter():
    scores, relevance = draw(1, 5), tensor(0.2, 0.9, 0.5, 0.0, 0.7)[None]
    scores.requires_grad_()
    order = torch.tensor([3, 0, 4, 1, 2])
    loss, permuted = rank_dpo(scores, relevance, 2.0), rank_dpo(scores[:, order], relevance[:, order], 2.0)
    assert torch.allclose(loss, permuted, atol=1e-14)
    assert torch.allclose(gain_weights(relevance[:, order]), gain_weights(relevance)[:, order][:, :, order])
    assert torch.allclose(*(gradient(each, scores)[0] for each in (loss, permuted)), atol=1e-14)


def test_equal_relevance_weighs_nothing():
    relevance = tensor(0.5, 0.5, 1.0, 0.5)[None]
    weights = gain_weights(relevance)[0]
    assert (weights[[0, 0, 1], [1, 3, 3]] == 0).all() and (weights.diagonal() == 0).all() and (weights[2, :2] > 0).all()
    # Rank ties go by index: 0, 1, 3 are second, third and fourth.
    gain = 2 - 2**0.5
    expected = [gain * (1 / math.log(2) - 1 / math.log(1 + rank)) for rank in (2, 3, 4)]
    assert weights[2, [0, 1, 3]].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("pair_norm", ["sum", "sum_weights", "num_pairs"])
def test_a_list_without_a_preference_gives_0_and_no_gradient(pair_norm):
    scores = draw(2, 3).requires_grad_()
    relevance = torch.stack([tensor(0.4, 0.4, 0.4), tensor(1, 0.5, 0)])
    loss = rank_dpo(scores, relevance, 1.0, pair_norm=pair_norm)
    slope = gradient(loss, scores)[0]
    assert loss[0] == 0 and loss[1] > 0 and (slope[0] == 0).all() and (slope[1] != 0).all() and slope.isfinite().all()


def test_finite_far_out_and_in_half_precision():
    scores = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    loss = rank_dpo(scores, torch.tensor([[0.0, 0.5, 1.0]]), 1.0)
    assert loss.isfinite().all() and gradient(loss, scores)[0].isfinite().all()
    assert rank_dpo(scores.detach().bfloat16(), torch.tensor([[0.0, 0.5, 1.0]]).bfloat16(), 1.0).dtype == torch.float32


def test_relevance_takes_no_gradient():
    relevance = tensor(1, 0.5, 0)[None].requires_grad_()
    scores = draw(1, 3).requires_grad_()
    loss = rank_dpo(scores, relevance, 1.0, pair_norm="sum_weights").sum()
    assert torch.autograd.grad(loss, relevance, allow_unused=True) == (None,)


def test_refusals():
    scores, relevance = lists()
    with pytest.raises(ValueError, match="shapes must be equal"):
        rank_dpo(scores, relevance[:, :1], 1.0)
    with pytest.raises(ValueError, match=r"\[B,K\]"):
        rank_dpo(scores[0], relevance[0], 1.0)
    with pytest.raises(ValueError, match="discount"):
        rank_dpo(scores, relevance, 1.0, discount="log10")
    with pytest.raises(ValueError, match="pair_norm"):
        rank_dpo(scores, relevance, 1.0, pair_norm="mean")
    with pytest.raises(ValueError, match="beta"):
        rank_dpo(scores, relevance, 0.0)
    with pytest.raises(TypeError, match="beta"):
        rank_dpo(scores, relevance)  # type: ignore[call-arg]
