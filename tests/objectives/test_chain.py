"""Objectives on a sampler that can be enumerated: where their minimum lies, and which way they point at the start."""

from itertools import product

import pytest
import torch
from helpers_objectives import PATHS, STATES, draw, expected_reward, gradient, run_prob, step_log_prob, tensor
from scipy.optimize import minimize

from diffusion_align.objectives import d3po, ordered_pairs, prdp, rank_dpo, spo, win_counts

REFERENCE = draw(2, STATES, STATES, seed=3)  # logits
REWARD = tensor(0.0, 1.0, 0.4)  # of x_0
START = tensor(0.5, 0.2, 0.3)
BETA = 0.5
PER_START = PATHS.view(STATES, -1, 3)  # [3,9,3], the runs of each x_T


def optimum():
    """[27]: the RL optimum with x_T given, ref(run | x_T) exp(r / beta) / Z(x_T), times the chance of x_T."""
    tilted = (step_log_prob(REFERENCE).sum(1) + REWARD[PATHS[:, 2]] / BETA).view(STATES, -1)
    return START[PATHS[:, 0]] * tilted.softmax(1).flatten()


def kl_to_optimum(logits):
    p = run_prob(logits, START)
    return (p * (p / optimum()).log()).sum().item()


def rl_objective(prob):
    """E[r] - beta KL to the reference, of runs with probabilities [27]."""
    return (prob * (REWARD[PATHS[:, 2]] - BETA * (prob / run_prob(REFERENCE, START)).log())).sum().item()


def minimise(loss):
    """Logits [2,3,3] that make `loss` least, from the reference; the loss there."""

    def value_and_gradient(point):
        logits = torch.from_numpy(point.copy()).view_as(REFERENCE).requires_grad_()
        value = loss(logits)
        return value.item(), gradient(value, logits)[0].flatten().numpy()

    found = minimize(value_and_gradient, REFERENCE.flatten().numpy(), jac=True, method="BFGS", options={"gtol": 1e-11})
    return torch.from_numpy(found.x).view_as(REFERENCE), found.fun


def regression(logits, groups):
    """PRDP over all runs in `groups` groups: 3, the runs of each x_T, or 1, all of them together."""
    log_ratio = (step_log_prob(logits) - step_log_prob(REFERENCE)).view(groups, -1, 2)
    return prdp(log_ratio, torch.zeros_like(log_ratio), REWARD[PATHS[:, 2]].view(groups, -1), BETA, None).mean()


def test_the_optimum_is_the_best_of_all_policies():
    """Of the objective itself, and not only of its formula: no perturbation of it does better."""
    best, logits = rl_objective(optimum()), minimise(lambda logits: regression(logits, 3))[0]
    for seed in range(20):
        assert rl_objective(run_prob(logits + 0.1 * draw(2, 3, 3, seed=seed), START)) < best
    assert rl_objective(run_prob(REFERENCE, START)) < best


def test_regression_on_pairs_that_share_x_T_finds_the_rl_optimum():
    logits, value = minimise(lambda logits: regression(logits, STATES))
    assert value < 1e-15
    assert kl_to_optimum(logits) < 1e-9
    assert rl_objective(run_prob(logits, START)) == pytest.approx(rl_objective(optimum()), abs=1e-9)


def test_regression_on_pairs_across_x_T_does_not():
    """Its target would need the chance of x_T to change, which no sampler can do."""
    logits, value = minimise(lambda logits: regression(logits, 1))
    rl_optimum = minimise(lambda logits: regression(logits, STATES))[0]
    assert 1e-3 < value < regression(rl_optimum, 1).item()
    assert kl_to_optimum(logits) > 5e-5
    assert rl_objective(run_prob(logits, START)) < rl_objective(optimum()) - 1e-5


def path_ratios(logits):
    """[3,9,2]: log-ratios of both steps of the runs of each x_T."""
    return (step_log_prob(logits) - step_log_prob(REFERENCE)).view(STATES, -1, 2)


def path_weights():
    """[3,9]: the reference's probability of each run given its x_T."""
    return step_log_prob(REFERENCE).sum(1).exp().view(STATES, -1)


def loss_d3po(logits):
    """Two runs from one x_T, drawn from the reference; the better final reward wins, and teaches both steps."""
    scores, weights, ratios = REWARD[PER_START[:, :, 2]], path_weights(), path_ratios(logits)
    start, win, lose = ordered_pairs(scores)
    chance = 2 * START[start] * weights[start, win] * weights[start, lose]
    return (chance[:, None] * d3po(ratios[start, win], ratios[start, lose], 0.1, 0.1)).sum()


def loss_spo(logits):
    """Two children of one parent, either step; a child's score is the reward that the reference expects from it."""
    log_ref = REFERENCE.log_softmax(2)
    ratios, ref = logits.log_softmax(2) - log_ref, log_ref.exp()
    reach = torch.stack([START, START @ ref[0]])  # [2,3], the chance of each parent
    scores = torch.stack([ref[1] @ REWARD, REWARD])[:, None, :].expand(2, STATES, STATES)
    step, parent, win, lose = (scores[..., :, None] > scores[..., None, :]).nonzero(as_tuple=True)
    chance = 2 * reach[step, parent] * ref[step, parent, win] * ref[step, parent, lose]
    return (chance * spo(ratios[step, parent, win], ratios[step, parent, lose], 10.0, 0.1)).sum()


def loss_rank_dpo(logits):
    """Lists of three runs from one x_T; minus the log-ratio stands for the error gap."""
    lists = torch.tensor(list(product(range(9), repeat=3)))  # [729,3]
    total = torch.zeros((), dtype=torch.float64)
    for start in range(STATES):
        relevance = win_counts(REWARD[PER_START[start, :, 2]][lists][None])
        chance = START[start] * path_weights()[start][lists].prod(1)
        total = total + (chance * rank_dpo(path_ratios(logits)[start].sum(1)[lists], relevance, 0.5)).sum()
    return total


def loss_prdp(logits):
    return regression(logits, STATES)


@pytest.mark.parametrize("loss", [loss_d3po, loss_spo, loss_rank_dpo, loss_prdp])
def test_at_the_reference_the_step_raises_the_expected_reward(loss):
    """The exact gradient of E[r] and the descent direction point the same way, and a small step does as promised."""
    logits = REFERENCE.clone().requires_grad_()
    down = gradient(-loss(logits), logits)[0]
    up = gradient(expected_reward(logits, START, REWARD), logits)[0]
    cosine = torch.nn.functional.cosine_similarity(down.flatten(), up.flatten(), dim=0)
    assert cosine > 0.5
    before = expected_reward(REFERENCE, START, REWARD)
    assert expected_reward(REFERENCE + 0.01 * down / down.norm(), START, REWARD) > before
