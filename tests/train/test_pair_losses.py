"""Losses of pairs on networks' outputs: each against plain autograd of its printed formula, and through the loop."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers_train import make_run

from diffusion_align.methods.dpo import make_loss
from diffusion_align.methods.shared.pair_losses import (
    PairOutputs,
    dspo_of_pairs,
    kto_of_pairs,
    mapo_of_pairs,
    margin_of,
    on_margin,
)
from diffusion_align.objectives import logistic
from diffusion_align.options import TrainDpo

BETA = 0.07


def outputs(seed=0):
    """Three pairs of 8 dims; the policy is near its reference and wants a gradient."""
    source = torch.Generator().manual_seed(seed)
    target, reference, off = (torch.randn(6, 2, 2, 2, generator=source, dtype=torch.float64) for _ in range(3))
    return PairOutputs((reference + 0.3 * off).requires_grad_(), reference, target)


def gradient(loss, pairs):
    return torch.autograd.grad(loss.sum(), pairs.policy, retain_graph=True)[0]


def by_rows(pairs):
    """Errors and reference errors of winners and losers by plain sums, [3] each."""
    of = [(side - pairs.target).square().flatten(1).sum(1) for side in (pairs.policy, pairs.reference)]
    return [part for errors in of for part in (errors[:3], errors[3:])]


def test_the_margin_is_that_of_the_rows():
    pairs = outputs()
    w, lose, rw, rl = by_rows(pairs)
    torch.testing.assert_close(margin_of(pairs), (rw - w) - (rl - lose), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("better", [False, True])
def test_kto_labels_winners_and_losers(better):
    """Li et al. 2024: w (1 - sigmoid(+-beta (g - baseline))), the baseline the batch's mean gain, at least 0."""
    pairs = outputs()
    if better:  # than the reference, at everything
        with torch.no_grad():
            pairs.policy.copy_(0.7 * pairs.reference + 0.3 * pairs.target)
    w, lose, rw, rl = by_rows(pairs)
    baseline = torch.cat([rw - w, rl - lose]).mean().detach().clamp(min=0)
    assert bool(baseline > 0) == better
    wanted = (1 - torch.sigmoid(BETA * (rw - w - baseline)) + 1 - torch.sigmoid(-BETA * (rl - lose - baseline))) / 2
    found = kto_of_pairs(BETA)(pairs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient(found, pairs), gradient(wanted, pairs))


def test_mapo_needs_no_reference():
    pairs = outputs()
    w, lose, _, _ = (side / 8 for side in by_rows(pairs))
    odds_w, odds_l = ((m / 2) / torch.expm1(m / 2) for m in (w, lose))
    wanted = w - 0.1 * F.logsigmoid(1000 * (odds_w - odds_l))
    found = mapo_of_pairs(0.1, 1000)(pairs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient(found, pairs), gradient(wanted, pairs))
    other = PairOutputs(pairs.policy, torch.zeros_like(pairs.reference), pairs.target)
    torch.testing.assert_close(mapo_of_pairs(0.1, 1000)(other), found)


@pytest.mark.parametrize(
    ("loss", "needs"),
    [(mapo_of_pairs(0.1, 1000), False), (kto_of_pairs(0.05), True), (dspo_of_pairs(0.05, 0.2), True),
     (on_margin(partial(logistic, beta=0.05)), True)],
)  # fmt: skip
def test_a_loss_without_a_reference_never_calls_it(loss, needs):
    """Counted in rows: 2 steps of 4 pairs are 16 for a loss that needs the reference, and none otherwise."""
    run, rows = make_run(loss=loss, max_steps=2, warmup=0), []
    frozen = run.reference
    run.reference = lambda x, t, text: (rows.append(len(x)), frozen(x, t, text))[1]
    records = list(run.steps())
    assert sum(rows) == (16 if needs else 0) and loss.needs_reference == needs
    compared = {"implicit_accuracy", "winner_error_gap", "loser_error_gap", "margin_p05", "margin_p50", "margin_p95"}
    assert (compared & set(records[0].metrics)) == (compared if needs else set())
    if needs:
        with pytest.raises(ValueError, match="give networks that have one"):
            run.reference = None
            next(run.steps())


def test_without_a_reference_the_policys_own_errors_are_reported():
    run = make_run(loss=mapo_of_pairs(0.1, 1000), max_steps=1, warmup=0)
    run.reference, seen = None, []
    record = next(run.steps(predict_policy=lambda x, t, text: (seen.append(run.network(x, t, text)), seen[-1])[1]))
    winner, loser = record.metrics["winner_error"], record.metrics["loser_error"]
    assert winner > 0 and loser > 0 and winner != loser
    with pytest.raises(ValueError, match="needs the outputs of a reference"):
        margin_of(PairOutputs(seen[0], None, seen[0]))


def test_dspo_moves_the_winners_target():
    pairs = outputs()
    w, lose, rw, rl = by_rows(pairs)
    push = 0.2 * (1 - torch.sigmoid(BETA * ((rw - w) - (rl - lose)))).view(3, 1, 1, 1)
    policy, reference, target = (side[:3] for side in (pairs.policy, pairs.reference, pairs.target))
    wanted = ((policy - target) - push * (policy - reference)).square().flatten(1).mean(1)
    found = dspo_of_pairs(BETA, 0.2)(pairs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient(found, pairs), gradient(wanted, pairs))


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_safe_loser_changes_its_gradient_only(keep):
    """Fu et al. 2025: loss as it was; the loser's gradient times min(1, (1 - keep) |q_w|^2 / <q_w, q_l>), batch-wide.

    Winner and loser are given like residuals, so that the scale is below 1."""
    pairs = outputs()
    with torch.no_grad():
        pairs.policy[3:] = pairs.target[3:] + 1.5 * (pairs.policy[:3] - pairs.target[:3])
    plain, safe = on_margin(partial(logistic, beta=BETA)), on_margin(partial(logistic, beta=BETA), keep=keep)
    free, held = gradient(plain(pairs), pairs), gradient(safe(pairs), pairs)
    torch.testing.assert_close(safe(pairs), plain(pairs))
    torch.testing.assert_close(held[:3], free[:3])
    torch.testing.assert_close(held[3:], min(1.0, (1 - keep) / 1.5) * free[3:])


@pytest.mark.parametrize(
    "loss",
    [kto_of_pairs(0.05), mapo_of_pairs(0.1, 1000), dspo_of_pairs(0.05, 0.2),
     on_margin(partial(logistic, beta=0.05), keep=0.5)],
)  # fmt: skip
def test_each_trains_through_the_loop(loss):
    """From a start where policy and reference are one; what it asks for falls."""
    run = make_run(loss=loss, max_steps=30, warmup=0, total=60)
    records = list(run.steps())
    assert all(record.updated for record in records)
    assert sum(r.loss for r in records[-8:]) < sum(r.loss for r in records[:8])


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, on_margin(partial(logistic, beta=BETA))),
        ({"winner_share": 0.5}, on_margin(partial(logistic, beta=BETA), keep=0.5)),
        ({"loss_type": "kto_pairs"}, kto_of_pairs(BETA)),
        ({"loss_type": "mapo", "mapo_beta": 0.3}, mapo_of_pairs(0.3, 1000)),
        ({"loss_type": "dspo", "dspo_strength": 0.2}, dspo_of_pairs(BETA, 0.2)),
    ],
)
def test_the_options_name_these_losses(asked, wanted):
    pairs = outputs()
    found, wanted = make_loss(TrainDpo(**asked), BETA, 1000)(pairs), wanted(pairs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient(found, pairs), gradient(wanted, pairs))
