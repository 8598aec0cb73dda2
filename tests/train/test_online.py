"""The online methods on a toy: counts of network calls, exact gradients, the start, and what they learn."""

import math
from functools import partial

import pytest
import torch
from helpers_online import METHODS, PROMPTS, Toy, darkness
from helpers_train import SHAPE

from diffusion_align.methods.d3po import learn_d3po, pairs_of
from diffusion_align.methods.ddpo import learn_policy_gradient
from diffusion_align.methods.prdp import learn_prdp
from diffusion_align.methods.shared.runs import checked, draw_runs, once_a_group, scored
from diffusion_align.methods.shared.start_checks import Allowed, require_equal_ratios
from diffusion_align.rewards import RewardError
from diffusion_align.samplers.kernel import step_gaussian

SAMPLES = [(0, 1), (0, 4)]


def by_hand(toy, runs):
    """log pi_theta(step) of every stored step [T,B] with torch's Normal, by plain autograd, and the reference's."""

    def of(bind):
        denoise, rows, history = runs.under(bind), [], []
        for k in range(len(toy.table)):
            x = runs.trajectory.states[k]
            history.insert(0, denoise(x, toy.table.timesteps[k].expand(len(x))))
            mean, std = step_gaussian(toy.table, k, x, *history[: int(toy.table.order[k])])
            if toy.table.stochastic[k]:
                normal = torch.distributions.Normal(mean, std[0])
                rows.append(normal.log_prob(runs.trajectory.states[k + 1]).flatten(1).sum(1))
        return torch.stack(rows)

    with torch.no_grad():
        reference = of(toy.reference)
    return of(toy.policy), reference


@pytest.mark.parametrize(
    ("window", "final"),
    [(None, "zero"), ((2, 1), "zero"), ((1, 2), "zero"), (None, "sigma_min"), ((5, 1), "sigma_min")],
)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_d3po_is_its_definition_over_all_pairs(order, guidance, window, final):
    """Yang et al., eq. 14 with the code's clamp, written out: loops over pairs and steps, sums by Normal."""
    toy = Toy(double=True, order=order, guidance=guidance, group=3, window=window, final=final)
    assert int(toy.table.stochastic.sum()) == (window[1] if window else 6 if final == "sigma_min" else 5)
    toy.move()
    runs = toy.draw(SAMPLES)
    now, reference = by_hand(toy, runs)
    expected, count = 0.0, 0
    for g in range(2):
        for i in range(3):
            for j in range(3):
                if runs.reward[g, i] > runs.reward[g, j]:
                    count += 1
                    q = ((now - reference) / 32).exp().clamp(0.9, 1.1).log()
                    logit = 5.0 * (q[:, 3 * g + i] - q[:, 3 * g + j])
                    expected = expected - torch.nn.functional.logsigmoid(logit).mean()
    (0.25 * expected).backward()
    wanted = toy.gradients()
    columns = learn_d3po(runs, toy.policy, 0.25, beta=5.0, clip=0.1)
    assert len(columns["loss"]) == count == 6
    assert columns["loss"].sum().item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(toy.gradients(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(("window", "final"), [(None, "zero"), ((2, 2), "zero"), (None, "sigma_min")])
@pytest.mark.parametrize(("mean", "clip"), [(False, None), (False, 0.5), (True, 1e-2)])
@pytest.mark.parametrize("order", [1, 2])
def test_prdp_is_its_definition(order, mean, clip, window, final):
    """Deng et al., App. G, in the unit of their code (`mean`) and in nats, after the policy has moved off the runs."""
    toy = Toy(double=True, order=order, group=3, window=window, final=final)
    toy.move()
    runs = toy.draw(SAMPLES)
    toy.move(0.02)
    with torch.no_grad():
        old = runs.trajectory.log_prob[toy.table.stochastic]
    now, reference = by_hand(toy, runs)
    unit = 32 if mean else 1
    rho, rho_old = (now - reference) / unit, (old - reference) / unit
    held = rho if clip is None else torch.minimum(torch.maximum(rho, rho_old - clip), rho_old + clip)
    R, Rc = (v.mean(0) if mean else v.sum(0) for v in (rho, held))
    expected = 0.0
    for g in range(2):
        pairs = []
        for i in range(3):
            for j in range(3):
                gap = runs.reward[g, i].double() - runs.reward[g, j].double()
                if gap > 0:
                    a, b = 3 * g + i, 3 * g + j
                    pairs.append(torch.maximum((R[a] - R[b] - gap / 0.05) ** 2, (Rc[a] - Rc[b] - gap / 0.05) ** 2))
        expected = expected + torch.stack(pairs).mean()
    expected.backward()
    wanted = toy.gradients()
    columns = learn_prdp(runs, toy.policy, 1.0, beta=0.05, clip=clip, mean=mean)
    assert columns["loss"].sum().item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(toy.gradients(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_prdp_in_float32_has_the_gradient_of_float64_at_published_targets():
    """Small-scale constants at Stable Diffusion 1.5's size: targets near 1e9 nats, a clip of 0.016 nats a step, which
    about half of the steps are beyond."""
    found = []
    for double in (False, True):
        toy = Toy(double=double, group=4)
        runs = toy.draw(SAMPLES)
        toy.move(0.003)
        constants = {"beta": 3.7e-11 * 5 * 32, "clip": 0.016 / 32, "mean": True}
        columns = learn_prdp(runs, toy.policy, 1.0, **constants)
        found.append((toy.gradients(), columns["loss"], columns["clamped"]))
    (narrow, loss, clamped), (wide, exact, share) = found
    assert torch.equal(clamped, share.to(clamped)) and (0.2 < share).all() and (share < 0.8).all()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)
    assert (narrow.double() - wide).norm() < 1e-3 * wide.norm()


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("order", [1, 2])
def test_policy_gradient_is_its_definition(order, final):
    toy = Toy(double=True, order=order, group=4, final=final)
    toy.move()
    runs = toy.draw(SAMPLES)
    toy.move(0.02)
    old = runs.trajectory.log_prob[toy.table.stochastic]
    now, reference = by_hand(toy, runs)
    reward = runs.reward.double()
    advantage = ((reward - reward.mean(1, True)) / (reward.std(1, correction=0, keepdim=True) + 1e-6)).flatten()
    ratio = ((now - old) / 32).exp()
    surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.99, 1.01)).mean(0).sum()
    surrogate.backward()
    wanted = toy.gradients()
    columns = learn_policy_gradient(runs, toy.policy, 1.0, clip=0.01)
    assert columns["loss"].sum().item() == pytest.approx(surrogate.item(), rel=1e-4, abs=1e-5)  # states are float32
    torch.testing.assert_close(toy.gradients(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_a_kl_weight_pulls_towards_the_reference():
    """The gradient of the exact KL of each step's Gaussians, by hand; the rewards differ by next to nothing."""
    toy = Toy(double=True, group=2, reward=lambda x, p: torch.arange(len(x)) % 2 * 1e-9)
    toy.move()
    runs = toy.draw(SAMPLES)
    expected = 0.0
    for k in range(len(toy.table) - 1):
        x, t = runs.trajectory.states[k], toy.table.timesteps[k].expand(4)
        apart = toy.table.c[k, 0] * (runs.under(toy.policy)(x, t) - runs.under(toy.reference)(x, t).detach())
        expected = expected + 0.3 * (apart.flatten(1).square().sum(1) / (2 * toy.table.std[k] ** 2)).sum() / 5
    expected.backward()
    wanted = toy.gradients()
    learn_policy_gradient(runs, toy.policy, 1.0, clip=0.01, kl_weight=0.3, std="none")
    torch.testing.assert_close(toy.gradients(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("guided", [1, 2])
@pytest.mark.parametrize("order", [1, 2])
def test_network_evaluations_of_a_round(order, guided, share):
    """n steps of which the last has no density; group K. D3PO: K g n rollout, K g (n-1) with gradient, as many of the
    reference, whatever the number of pairs; PRDP: the same while its data are fresh, else as many again without. Where
    the group shares its start, that one state is asked about once."""
    n, group = 6, 3
    spared = guided * (group - 1) if share else 0
    run, learn = group * guided * n - spared, group * guided * (n - 1) - spared
    for name, more, without in (("d3po", {}, 0), ("prdp", {}, 0), ("prdp", {"fresh": False}, learn), ("ddpo", {}, 0)):
        toy = Toy(order=order, guidance=float(3 if guided == 2 else 1), group=group, share=share)
        assert counts(toy, toy.method(name, **more)) == (run, without, learn, learn), name


@pytest.mark.parametrize("order", [1, 2])
def test_network_evaluations_with_a_window_of_noise(order):
    """Noise in step 2 of 6: until then the group is one run; learnt from is one state, at order 2 with that before."""
    for name in ("d3po", "prdp", "ddpo"):
        toy = Toy(order=order, guidance=1.0, group=4, window=(2, 1))
        assert counts(toy, toy.method(name)) == (3 + 3 * 4, 0, order, order), name
    toy = Toy(order=order, guidance=1.0, group=4, window=(2, 2), share=False)
    assert counts(toy, toy.method("d3po")) == (6 * 4, 0, 4 * (order + 1), 4 * (order + 1))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_evaluating_shared_states_once_changes_nothing(guidance):
    """Against every row asked by itself: the same answers and gradients, for groups of one state and of several."""
    toy = Toy(double=True, guidance=guidance)
    toy.move()
    _, text = toy.texts(SAMPLES)
    source = torch.Generator().manual_seed(0)
    apart = torch.randn(6, *SHAPE, generator=source, dtype=torch.float64)
    weights = torch.randn(6, *SHAPE, generator=source, dtype=torch.float64)
    for x in (apart, apart[::3].repeat_interleave(3, 0)):
        t = torch.full((6,), 500.0, dtype=torch.float64)
        found, wanted = once_a_group(toy.policy, text, 3)(x, t), toy.policy(text.repeat_interleave(3, 0))(x, t)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        (found * weights).sum().backward()
        once = toy.gradients()
        (wanted * weights).sum().backward()
        torch.testing.assert_close(once, toy.gradients(), rtol=1e-5, atol=1e-5)
    assert toy.policy_calls.grad == (2 if guidance > 1 else 1) * (6 + 6 + 2 + 6)


def counts(toy, method):
    """Rows asked of the networks for one prompt: of the policy in the rollout, in learning without and with gradients,
    and of the reference."""
    runs = method.collect(SAMPLES[:1], 0)
    drawn = toy.policy_calls.plain
    assert toy.policy_calls.grad == 0
    method.learn(runs, 1.0)
    assert toy.reference_calls.grad == 0
    return drawn, toy.policy_calls.plain - drawn, toy.policy_calls.grad, toy.reference_calls.plain


@pytest.mark.parametrize(("order", "of_a_pair"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("all_pairs", [False, True])
def test_network_evaluations_of_spo(order, of_a_pair, all_pairs):
    """A prompt: start + 1 + (n - start - 1) K. A guided pair: 2 policy and 2 reference, half of the authors' code; at
    order 2 another of each, for the state before. All pairs of one parent cost what one costs."""
    n, start, children = 6, 2, 3
    toy = Toy(order=order)
    pairs = toy.branch(SAMPLES[:1], 0, children, start, all_pairs=all_pairs)
    assert toy.policy_calls.plain == 2 * (start + 1 + (n - start - 1) * children) and toy.reference_calls.plain == 0
    toy.method("spo").learn(pairs, 1.0)
    families = n - 1 - start
    assert len(pairs) == families * (3 if all_pairs else 1)
    assert toy.policy_calls.grad == toy.reference_calls.plain == 2 * families * of_a_pair


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("order", [1, 2])
def test_the_start_is_exact(name, order):
    """Before the first update every ratio is 1 and every margin 0, to the bit, and the loss says so."""
    toy = Toy(order=order)
    record = next(toy.rounds(toy.method(name)))
    assert record.metrics.get("kl", record.metrics.get("kl_w")) == 0
    assert all(value == 0 for key, value in record.metrics.items() if key.startswith(("log_ratio", "drift")))
    if name in ("d3po", "spo"):
        assert record.loss == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", METHODS)
def test_a_policy_that_is_not_its_reference_is_refused_at_the_start(name):
    toy = Toy()
    toy.move(0.5)
    before = toy.weights()
    with pytest.raises(RuntimeError, match="before the first update.*differs from its reference"):
        next(toy.rounds(toy.method(name)))
    assert all(torch.equal(a, b) for a, b in zip(before, toy.weights(), strict=True))


def test_a_ratio_that_is_not_one_is_refused_at_the_start():
    columns = {"drift": torch.tensor([0.0, 2.0]), "log_ratio": torch.zeros(2)}
    check = partial(require_equal_ratios, dims=32, allowed=Allowed(1e-3, step=1.5, run=6.0, name="TF32"))
    with pytest.raises(RuntimeError, match="is not 1: .* is 2 nats over 32 dims, and rounding in TF32 explains 1.5"):
        check(columns)
    check({"drift": torch.tensor([1.4]), "log_ratio": torch.tensor([5.0])})
    with pytest.raises(RuntimeError, match="differs from its reference: .* is 7 nats .* rounding in TF32 explains 6"):
        check({"drift": torch.zeros(1), "log_ratio_w": torch.tensor([7.0])})
    # A number that is not finite makes the step be skipped; it is no sign of another policy.
    check({"drift": torch.tensor([float("nan")]), "log_ratio": torch.tensor([float("inf")])})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("order", [1, 2])
def test_each_method_raises_the_reward(name, order):
    """On prompts and noise it was not trained on, by more than another processor's rounding moves the gain.

    SPO compares many children, finished, from the first step on: of few children late in a run it learns too little.
    """
    toy = Toy(order=order, group=4)
    toy.branch = partial(toy.branch, children=8, start=0, lookahead=6)
    toy.optimizer = torch.optim.Adam(toy.parameters, lr=0.02)
    held_out = [(99, i) for i in range(len(PROMPTS))]
    before = toy.draw(held_out).reward.mean()
    more = {"beta": 0.01} if name == "prdp" else {}
    for record in toy.rounds(toy.method(name, **more), max_steps=15):
        assert record.updated
    gain = toy.draw(held_out).reward.mean() - before
    assert gain > 0.02


@pytest.mark.parametrize("order", [1, 2])
def test_only_the_first_steps_are_learnt_from_where_asked(order):
    """The same states and reward; the gradient is that of the loss over those steps, and the others cost nothing."""
    toy = Toy(order=order, double=True)
    toy.move()
    settings = {"group": 2, "share_noise": True, "shape": SHAPE, "seed": 0}
    arguments = (toy.policy, toy.reference, toy.table, toy.prompted(SAMPLES))
    runs = draw_runs(*arguments, **settings), draw_runs(*arguments, **settings, learn_steps=3)
    whole, first = (scored(some, darkness) for some in runs)
    assert torch.equal(whole.trajectory.states, first.trajectory.states) and torch.equal(whole.reward, first.reward)
    assert toy.reference_calls.plain == 2 * (2 * 2 + 4 * (4 + 2))  # the start that two share counts once
    columns = learn_d3po(first, toy.policy, 1.0, beta=1.0, clip=None)
    assert toy.policy_calls.grad == 2 * (2 + 4 * 2)
    found = toy.gradients()
    now, reference = by_hand(toy, whole)
    winner, loser = pairs_of(whole)
    q = ((now - reference) / 32)[:3]
    expected = -torch.nn.functional.logsigmoid(q[:, winner] - q[:, loser]).mean(0).sum()
    expected.backward()
    wanted = toy.gradients()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert columns["loss"].sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_reference_that_is_renewed_every_round_is_the_policy_that_ran():
    """It asks for no evaluation, and log-ratios to it are those to the behaviour."""
    toy = Toy(order=2)
    toy.move()
    prompted, settings = toy.prompted(SAMPLES), {"group": 2, "share_noise": True, "shape": SHAPE, "seed": 0}
    runs = scored(draw_runs(toy.policy, None, toy.table, prompted, **settings), darkness)
    assert toy.reference_calls.plain == 0 and torch.equal(runs.reference, runs.trajectory.clean)
    assert bool((learn_d3po(runs, toy.policy, 1.0, beta=1.0, clip=None)["log_ratio_w"] == 0).all())
    toy.move()
    columns = learn_d3po(runs, toy.policy, 1.0, beta=1.0, clip=None)
    assert bool((columns["log_ratio_w"] != 0).all())


def test_pairs_share_their_start_or_not_and_runs_have_addresses():
    shared, apart = Toy().draw(SAMPLES), Toy(share=False).draw(SAMPLES)
    assert torch.equal(shared.trajectory.states[0, 0], shared.trajectory.states[0, 1])
    assert not torch.equal(apart.trajectory.states[0, 0], apart.trajectory.states[0, 1])
    alone = Toy().draw(SAMPLES[1:])
    torch.testing.assert_close(alone.trajectory.states, shared.trajectory.states[:, 2:], rtol=1e-5, atol=1e-5)
    assert shared.trajectory.states.shape == (7, 4, *SHAPE)


def test_a_failed_reward_removes_its_picture_from_pairs_only():
    def sometimes(latents, prompts):
        values = darkness(latents, prompts)
        values[0] = float("inf")
        return values

    runs = Toy(group=3, reward=sometimes).draw(SAMPLES)
    winner, loser = pairs_of(runs)
    assert len(winner) == 1 + 3 and 0 not in torch.cat([winner, loser])
    assert bool((runs.reward.flatten()[winner] > runs.reward.flatten()[loser]).all())


def test_latents_that_are_not_finite_have_no_score():
    """Their picture may look like any other to a reward; and if none is finite, that is no fault of the reward."""
    latents = torch.zeros(3, 2, 4, 4)
    latents[1, 0, 0, 0] = torch.nan
    found = checked(lambda x, prompts: torch.ones(len(x)), latents, ["a"] * 3)
    assert found.isnan().tolist() == [False, True, False]
    assert checked(lambda x, prompts: torch.ones(len(x)), latents * torch.inf, ["a"] * 3).isnan().all()
    with pytest.raises(RewardError, match="no finite number"):
        checked(lambda x, prompts: torch.full((len(x),), torch.nan), latents, ["a"] * 3)
