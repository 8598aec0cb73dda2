"""SPO's resampler and its loss: who is compared with whom, at which step, and by what."""

import math
from dataclasses import replace

import pytest
import torch
from helpers_online import TEXTS, Toy
from helpers_train import SHAPE
from scipy import stats

from diffusion_align import rng
from diffusion_align.methods.shared.branches import Branching, resample
from diffusion_align.methods.spo import learn_spo
from diffusion_align.samplers.kernel import step_gaussian

SAMPLES = [(0, i) for i in range(5)]


@pytest.mark.parametrize("order", [1, 2])
def test_pairs_share_parent_and_step_and_win_by_the_score_one_step_later(order):
    """T23, T24: the children at step k are scored by their clean predictions at the timestep of step k + 1."""
    toy, seen = Toy(order=order), []

    def score(clean, prompts, t):
        values = 20 * toy.reward(clean, prompts)
        seen.append((clean.view(3, 5, 2, 4, 4), list(prompts), t, values.view(3, 5)))
        return values

    toy_branch, pairs = Toy(order=order), None
    prompts, text = toy_branch.texts(SAMPLES)
    pairs = resample(
        toy_branch.policy, toy_branch.table, toy_branch.prompted(SAMPLES), score, Branching(3, 2, 0.0),
        shape=(2, 4, 4), seed=0,
    )  # fmt: skip
    assert pairs.shared and torch.equal(pairs.parent[0], pairs.parent[1])
    assert pairs.k.tolist() == [2] * 5 + [3] * 5 + [4] * 5 and len(seen) == 3
    steps = toy_branch.table.timesteps
    for i, (clean, asked, t, values) in enumerate(seen):
        assert asked == prompts * 3 and torch.equal(t, steps[3 + i].float().expand(15))
        rows = pairs.k == 2 + i
        best, worst = values.max(0).values, values.min(0).values
        torch.testing.assert_close(pairs.gap[rows], best - worst)
        # The winner's own clean prediction is the one that scored best.
        x = pairs.child[0, rows]
        again = toy_branch.policy(text)(x, t[:5])
        wanted = clean[values.argmax(0), torch.arange(5)]
        torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segment", [1, 2])
@pytest.mark.parametrize("order", [1, 2])
def test_children_are_compared_by_where_they_end_when_looked_ahead(order, segment):
    """Each by the picture that the noise-free sampler makes of it: walked again here by the rows of its table, from the
    child and the prediction before it."""
    plain, toy, seen = Toy(order=order), Toy(order=order), []
    logits = toy.logits

    def record(x, prompts, t):
        seen.append((x, t))
        return logits(x, prompts, t)

    toy.logits = record
    pairs = toy.branch(SAMPLES, lookahead=99, segment=segment)
    without = plain.branch(SAMPLES, segment=segment)
    assert pairs.k.tolist() == without.k.tolist() and all(float(t.max()) == 0 for _, t in seen)
    first = pairs.k == 2
    torch.testing.assert_close(pairs.parent[:, first], without.parent[:, first])
    denoise, table = toy.policy(toy.texts(SAMPLES)[1]), toy.quiet
    rows = pairs.k == 2 + segment - 1
    x, past = pairs.child[0, rows], [denoise(pairs.parent[0, rows], table.timesteps[1 + segment].float().expand(5))]
    for k in range(2 + segment, len(table)):
        past.insert(0, denoise(x, table.timesteps[k].float().expand(5)))
        x = table.cx[k].float() * x + sum(c.float() * m for c, m in zip(table.c[k], past, strict=False))
    best = 20 * toy.reward(x, [])
    torch.testing.assert_close(best, 20 * toy.reward(seen[0][0], []).view(3, 5).max(0).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("lookahead", "evaluations"), [(1, 3 + 3 * 3 + 2 * 3), (2, 3 + 3 * 3 + 3 * 3), (9, 21)])
def test_a_look_ahead_evaluates_the_network_once_per_step(lookahead, evaluations):
    """n = 6, from step 2 on, K = 3: the children at steps 3, 4 and 5 have 2, 1 and 0 states before the end."""
    toy = Toy(guidance=1.0)
    toy.branch(SAMPLES[:1], lookahead=lookahead)
    assert toy.policy_calls.plain == evaluations


@pytest.mark.parametrize("order", [1, 2])
def test_in_a_window_the_children_of_one_step_are_compared_on_a_noise_free_way(order):
    """The parent is where the noise-free sampler stands, walked here by the rows of its table; the children are the
    noisy step's, from each prompt's own source; nothing is asked of the network after the last of them."""
    toy, full = Toy(order=order, guidance=1.0, window=(2, 1)), Toy(order=order).table
    prompts, text = toy.texts(SAMPLES)
    pairs = toy.branch(SAMPLES, start=0, children=4)
    assert pairs.k.tolist() == [2] * 5 and toy.policy_calls.plain == 5 * (3 + 4)
    x, past = rng.normal_batch(SHAPE, 0, "x_T", SAMPLES), []
    for k in range(3):
        past.insert(0, toy.policy(text)(x, full.timesteps[k].float().expand(5)))
        table = full if k == 2 else toy.quiet
        mean = table.cx[k].float() * x + sum(c.float() * m for c, m in zip(table.c[k], past, strict=False))
        parent, x = x, mean
    torch.testing.assert_close(pairs.parent, parent.expand(2, *parent.shape), rtol=1e-4, atol=1e-5)
    for i, sample in enumerate(SAMPLES):
        source = rng.generator(0, "run", *sample)
        drawn = [mean[i] + full.std[2].float() * torch.randn(SHAPE, generator=source) for _ in range(4)]
        for side in pairs.child[:, i]:
            assert sum(bool(torch.allclose(side, x, rtol=1e-4, atol=1e-4)) for x in drawn) == 1


@pytest.mark.parametrize("segment", [1, 4])
def test_with_noise_in_the_last_step_every_step_is_compared_the_last_by_the_finished_picture(segment):
    """The published 20 steps from 4 on: 16 transitions a prompt, in 16 comparisons or, in segments of 4, in four.
    Behind the last step stand the children themselves, scored as finished pictures at time 0."""
    toy, seen = Toy(steps=20, guidance=1.0, final="sigma_min"), []
    logits = toy.logits

    def record(x, prompts, t):
        seen.append((x, t))
        return logits(x, prompts, t)

    toy.logits = record
    pairs = toy.branch(SAMPLES[:2], start=4, segment=segment)
    assert sorted(pairs.k.tolist()) == sorted([*range(4, 20)] * 2) and pairs.score.shape == (16 // segment, 2)
    times = [float(t[0]) for _, t in seen]
    assert times == [float(toy.table.timesteps[k]) for k in range(4 + segment, 20, segment)] + [0.0]
    finished, _ = seen[-1]
    last = pairs.k == 19
    for side in pairs.child[:, last].unbind(0):
        assert all(any(torch.equal(one, other) for other in finished) for one in side)
    # The noise-free table ends at the same level, and a look ahead from there is no step.
    assert float(toy.quiet.half_log_snr[-1]) == float(toy.table.half_log_snr[-1]) < math.inf
    ahead = Toy(steps=20, guidance=1.0, final="sigma_min").branch(SAMPLES[:2], start=4, segment=segment, lookahead=99)
    assert sorted(ahead.k.tolist()) == sorted(pairs.k.tolist())


def test_the_next_parent_is_a_child_of_the_last_and_any_child_as_likely():
    """Chi-square over which of the three children goes on; the winner would raise the score, the loser lower it."""
    counts = torch.zeros(3)
    toy = Toy(steps=4, guidance=1.0)
    for epoch in range(60):
        samples = [(epoch, i) for i in range(6)]
        pairs = toy.branch(samples, children=3, start=0)
        by_step = [pairs.k == k for k in range(3)]
        for k in range(2):
            win, lose = pairs.child[0, by_step[k]], pairs.child[1, by_step[k]]
            parent = pairs.parent[0, by_step[k + 1]]
            is_win, is_lose = ((side == parent).flatten(1).all(1) for side in (win, lose))
            counts += torch.stack([is_win.sum(), is_lose.sum(), (~is_win & ~is_lose).sum()])
    assert counts.sum() == 720 and stats.chisquare(counts.tolist()).pvalue > 1e-3


def test_a_pair_is_kept_iff_its_softmax_gap_passes():
    toy = Toy()
    everything, some = toy.branch(SAMPLES, threshold=0.0), toy.branch(SAMPLES, threshold=0.3)
    kept = torch.tanh(everything.gap / 2) > 0.3
    assert 0 < kept.sum() < len(kept) and torch.equal(some.gap, everything.gap[kept])
    assert torch.equal(some.parent, everything.parent[:, kept]) and torch.equal(some.k, everything.k[kept])
    assert some.score.shape == everything.score.shape == (3, 5)
    assert torch.equal(some.kept.flatten(), kept) and bool(everything.kept.all())
    assert len(toy.branch(SAMPLES, threshold=1 - 1e-12)) == 0


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_all_pairs_of_a_state_are_those_that_are_clearly_apart(threshold):
    """Each is worked out here from the scores as they were asked for; the best and the worst are one of them."""
    toy, seen = Toy(), []
    logits = toy.logits

    def record(x, prompts, t):
        values = logits(x, prompts, t)
        seen.append(values.view(3, 5).tolist())
        return values

    toy.logits = record
    pairs = toy.branch(SAMPLES, all_pairs=True, threshold=threshold)
    wanted = [
        (2 + step, i, win[i] - lose[i])
        for step, values in enumerate(seen)
        for i in range(5)
        for win in values
        for lose in values
        if win[i] > lose[i] and math.tanh((win[i] - lose[i]) / 2) > threshold
    ]
    prompt_of = [next(i for i in range(5) if torch.equal(text, TEXTS[i])) for text in pairs.text]
    found = list(zip(pairs.k.tolist(), prompt_of, pairs.gap.tolist(), strict=True))
    assert [row[:2] for row in sorted(found)] == [row[:2] for row in sorted(wanted)]
    assert [row[2] for row in sorted(found)] == pytest.approx([row[2] for row in sorted(wanted)], abs=1e-5)
    assert len({*pairs.family.tolist()}) == len({row[:2] for row in found})
    best = toy.branch(SAMPLES, threshold=threshold)
    assert torch.equal(best.kept, pairs.kept) and len(pairs) > len(best)
    for m in range(len(best)):
        same = (pairs.child == best.child[:, m : m + 1]).flatten(2).all(2).all(0) & (pairs.k == best.k[m])
        assert same.sum() == 1 and torch.equal(pairs.parent[:, same], best.parent[:, m : m + 1])


@pytest.mark.parametrize("all_pairs", [False, True])
@pytest.mark.parametrize(("segment", "final"), [(1, "zero"), (2, "zero"), (2, "sigma_min")])
@pytest.mark.parametrize("order", [1, 2])
def test_spo_is_its_definition(order, segment, final, all_pairs):
    """eq. 5 with the clamp, by torch's Normal and plain autograd, pair by pair, history through the network too."""
    toy = Toy(double=True, order=order, final=final)
    pairs = toy.branch(SAMPLES[:2], start=2, segment=segment, all_pairs=all_pairs)
    toy.move()
    expected = 0.0
    for m in range(len(pairs)):
        k, q = int(pairs.k[m]), []
        for side in range(2):
            ratio = 0.0
            for sign, bind in ((1, toy.policy), (-1, toy.reference)):
                denoise = bind(pairs.text[m : m + 1])
                x, before = pairs.parent[side, m : m + 1], pairs.before[side, m : m + 1]
                history = [denoise(x, toy.table.timesteps[k : k + 1])]
                if int(toy.table.order[k]) > 1:
                    history.append(denoise(before, toy.table.timesteps[k - 1 : k]))
                mean, std = step_gaussian(toy.table, k, x, *history)
                log_prob = torch.distributions.Normal(mean, std[0]).log_prob(pairs.child[side, m : m + 1])
                ratio = ratio + sign * log_prob.mean()
            q.append(ratio.exp().clamp(0.9, 1.1).log())
        expected = expected - torch.nn.functional.logsigmoid(10.0 * (q[0] - q[1]))
    (0.5 * expected).backward()
    wanted = toy.gradients()
    columns = learn_spo(pairs, toy.policy, toy.reference, toy.table, 0.5, beta=10.0, clip=0.1, at_once=3)
    # States, and the coefficients of steps that are gathered for a batch, are float32: an ulp of a mean (1.2e-7) over a
    # step's deviation, some tens of ulps of a log-ratio.
    assert columns["loss"].sum().item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(toy.gradients(), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_the_identity_of_one_parent():
    """METHODS-CORE 4.4: q_w - q_l = sum (mu_theta - mu_ref)(y_w - y_l) / std^2, linear in the policy's mean."""
    toy = Toy(double=True)
    pairs = toy.branch(SAMPLES)
    toy.move()
    columns = learn_spo(pairs, toy.policy, toy.reference, toy.table, 1.0, beta=1.0, clip=None)
    means = []
    with torch.no_grad():
        for bind in (toy.policy, toy.reference):
            t = toy.table.timesteps[pairs.k]
            means.append(step_gaussian(toy.table, pairs.k, pairs.parent[0], bind(pairs.text)(pairs.parent[0], t))[0])
    std = toy.table.std[pairs.k]
    apart = ((means[0] - means[1]) * (pairs.child[0] - pairs.child[1])).flatten(1).sum(1) / std**2
    torch.testing.assert_close(
        columns["log_ratio_w"] - columns["log_ratio_l"], apart, rtol=0, atol=1e-5 * apart.abs().max().item()
    )


def test_segments_go_on_by_themselves_and_all_their_transitions_count():
    """Steps 1 .. 4 of 6 in segments of 2: two comparisons, four transitions; parents are shared where one starts."""
    toy = Toy()
    pairs = toy.branch(SAMPLES, start=1, segment=2)
    assert pairs.k.tolist() == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5 and pairs.score.shape == (2, 5)
    same = (pairs.parent[0] == pairs.parent[1]).flatten(1).all(1)
    assert torch.equal(same, (pairs.k == 1) | (pairs.k == 3)) and not pairs.shared
    # Within a segment a side's child is its next parent, and its parent the state before.
    assert torch.equal(pairs.child[:, :5], pairs.parent[:, 5:10])
    assert torch.equal(pairs.before[:, 5:10], pairs.parent[:, :5])
    assert torch.equal(pairs.gap[:5], pairs.gap[5:10])
    # The last segment may be shorter: it closes where the steps with a density end.
    assert toy.branch(SAMPLES, start=2, segment=2).k.tolist() == [2] * 5 + [3] * 5 + [4] * 5


def test_chains_do_not_depend_on_their_batch_mates():
    toy = Toy()
    together, alone = toy.branch(SAMPLES), toy.branch(SAMPLES[3:4])
    rows = (together.text == TEXTS[3]).flatten(1).all(1)
    torch.testing.assert_close(together.child[:, rows], alone.child, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.final[3:4], alone.final, rtol=1e-4, atol=1e-5)


def test_invalid_branchings_are_refused():
    with pytest.raises(ValueError, match="2 or more children from step 2 on: 1"):
        Toy().branch(SAMPLES, children=1)
    with pytest.raises(ValueError, match="from step 5 on"):
        Toy().branch(SAMPLES, start=5)
    toy = Toy()
    toy.table = replace(toy.table, stochastic=torch.tensor([True, False, True, False, False, False]))
    with pytest.raises(ValueError, match=r"at steps in a row, not at \[0, 2\]"):
        toy.branch(SAMPLES, start=0)


def test_a_failed_score_removes_only_its_comparison():
    toy, calls = Toy(), []

    def sometimes(latents, prompts):
        values = Toy().reward(latents, prompts)
        calls.append(0)
        values[0] = float("nan") if len(calls) == 1 else values[0]
        return values

    toy.reward = sometimes
    pairs = toy.branch(SAMPLES)
    assert len(pairs) == 14 and not bool(pairs.kept[0, 0]) and not bool(pairs.score.isnan().any())
