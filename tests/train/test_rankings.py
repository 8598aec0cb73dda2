"""RankDPO's loop against loops written by hand, finite differences and Diffusion-DPO's; its start, calls and memory."""

import itertools
import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from helpers_train import (
    BETA,
    SCHEDULE,
    SHAPE,
    TEXT,
    MemoryPairs,
    Network,
    in_processes,
    make_run,
    noised_lists,
    train_rankings,
)
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

from diffusion_align import rng
from diffusion_align.methods.rankdpo import ranking_scores
from diffusion_align.methods.shared.pair_losses import on_margin
from diffusion_align.objectives import gain_weights, logistic, rank_dpo
from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.checkpoints.state import pack, restore
from diffusion_align.train.optimizer import lr_schedule
from diffusion_align.train.run import Progress
from diffusion_align.train.steps import samples_at

SEED = 3
BOTH = pytest.mark.parametrize("one_graph", [False, True])


class MemoryRankings:
    """What the loop asks of a cache: lists of 3, or of the given lengths. Better pictures are darker."""

    def __init__(self, lengths=(3,) * 10):
        self.lengths = list(lengths)
        self.relevance = [[1 - i / (k - 1) for i in range(k)] for k in self.lengths]
        dark = [torch.tensor(shares).view(-1, 1, 1, 1) for shares in self.relevance]
        self.latents = [rng.normal((k, *SHAPE), 0, "toy", i) - dark[i] / 2 for i, k in enumerate(self.lengths)]
        self.text = rng.normal((len(self.lengths), *TEXT), 0, "toy text")
        self.empty_text = rng.normal((1, *TEXT), 0, "toy empty")

    def __len__(self):
        return len(self.lengths)

    groups, variants = None, 1

    def batch(self, indices, variants=None):
        return torch.stack([self.latents[i] for i in indices]), self.text[list(indices)]


class Toy:
    """A network, its frozen reference and the tools of a run."""

    def __init__(
        self,
        cache=None,
        moved=0.0,
        optimizer="adamw",
        trained=("down", "up"),
        pair_norm="sum",
        discount="ln",
        **settings,
    ):
        self.cache, self.network = cache or MemoryRankings(), Network()
        self.network.requires_grad_(False)
        self.parameters = {name: getattr(self.network, name).requires_grad_(True) for name in trained}
        with torch.no_grad():
            self.network.up += moved * rng.normal(self.network.up.shape, 0, "moved")
        self.reference = Network().requires_grad_(False)
        self.reference.adapter = False
        made = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
        self.optimizer = made(list(self.parameters.values()), lr=0.02)
        self.lr_scheduler = lr_schedule(self.optimizer, "cosine", warmup=0, total=100)
        self.loss = partial(rank_dpo, beta=BETA, pair_norm=pair_norm, discount=discount)
        self.settings = {
            "schedule": SCHEDULE, "prediction_type": "epsilon", "loss": self.loss, "beta": BETA,
            "pair_weights": partial(gain_weights, discount=discount), "accelerator": Accelerator(cpu=True),
            "batch_size": 4, "seed": SEED, "max_steps": 8, **settings,
        }  # fmt: skip

    def steps(self, progress=None, **changes):
        arguments = {"predict_policy": self.network, "predict_reference": self.reference} | self.settings | changes
        return train_rankings(
            self.cache,
            self.cache.relevance,
            parameters=list(self.parameters.values()),
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            progress=progress,
            **arguments,
        )

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def packed(self, progress):
        return pack(self.parameters, self.optimizer, self.lr_scheduler, progress)


def by_hand(toy, shared_noise, log=math.log):
    """Loss, scores and gradient of the first step by the paper's formulas: loops over prompts, pictures and pairs."""
    cache = toy.cache
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    order = rng.permutation(len(cache), SEED, "shuffle", 0)[:4].tolist()
    losses, scores, totals = [], [], []
    for i in order:
        t = rng.integers_batch(0, 1000, SEED, "timestep", [(0, i)])
        a, s = alphas[t].sqrt().float(), (1 - alphas[t]).sqrt().float()
        row = []
        for k, clean in enumerate(cache.latents[i]):
            noise = rng.normal(SHAPE, SEED, "noise", *((0, i) if shared_noise else (0, i, k)))
            x = (a * clean + s * noise)[None]
            error, reference = (
                (network(x, t, cache.text[i : i + 1])[0] - noise).square().sum()
                for network in (toy.network, toy.reference)
            )
            row.append(error - reference)
        phi = cache.relevance[i]
        rank = [1 + sum(other > mine for other in phi) for mine in phi]
        loss, total = 0.0, 0.0
        for i1, i2 in itertools.permutations(range(len(phi)), 2):
            if phi[i1] > phi[i2]:
                weight = abs(2 ** phi[i1] - 2 ** phi[i2]) * abs(1 / log(1 + rank[i1]) - 1 / log(1 + rank[i2]))
                loss = loss - weight * torch.log(torch.sigmoid(-BETA * (row[i1] - row[i2])))
                total += weight
        losses.append(loss)
        totals.append(total)
        scores.append(torch.stack(row).detach())
    mean = torch.stack(losses).mean()
    return mean, scores, totals, torch.autograd.grad(mean, list(toy.parameters.values()))


@BOTH
@pytest.mark.parametrize("shared_noise", [False, True])
@pytest.mark.parametrize("lengths", [(3,) * 10, (4, 2, 3, 2, 4, 4, 3, 2, 3, 3)])
def test_the_first_step_is_the_hand_written_one(one_graph, shared_noise, lengths):
    settings = {"shared_noise": shared_noise, "one_graph": one_graph, "max_grad_norm": None, "check_start": False}
    toy = Toy(MemoryRankings(lengths), moved=0.1, optimizer="sgd", **settings)
    loss, _, totals, gradients = by_hand(toy, shared_noise)
    start = toy.weights()
    record = next(toy.steps())
    assert record.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert record.metrics["pair_weight"] == pytest.approx(sum(totals) / 4, rel=1e-6)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert record.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.01
    for (name, weight), gradient in zip(toy.weights().items(), gradients, strict=True):
        assert torch.allclose(weight, start[name] - 0.02 * gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


def test_discount_and_pair_norm_reach_the_loss():
    """log2 scales all weights by log 2; a weighted mean does not feel it."""
    losses = {}
    for pair_norm, discount in itertools.product(("sum", "sum_weights", "num_pairs"), ("ln", "log2")):
        toy = Toy(moved=0.1, check_start=False, pair_norm=pair_norm, discount=discount)
        losses[pair_norm, discount] = next(toy.steps()).loss
    for pair_norm in ("sum", "num_pairs"):
        assert losses[pair_norm, "log2"] == pytest.approx(math.log(2) * losses[pair_norm, "ln"], rel=1e-5)
    assert losses["sum", "ln"] == pytest.approx(3 * losses["num_pairs", "ln"], rel=1e-5)  # three pictures, three pairs
    assert losses["sum_weights", "log2"] == pytest.approx(losses["sum_weights", "ln"], rel=1e-5)


@BOTH
def test_gradients_against_finite_differences(one_graph):
    toy = Toy(moved=0.1)
    samples = samples_at(0, 4, 10, SEED)
    indices = [i for _, i in samples]
    made = noised_lists(*toy.cache.batch(indices), samples, SCHEDULE, "epsilon", SEED, shared_noise=False)
    phi = torch.tensor([toy.cache.relevance[i] for i in indices])

    def loss():
        return toy.loss(ranking_scores(toy.network, toy.reference, made, one_graph=one_graph), phi).mean()

    loss().backward()
    for name, parameter in toy.parameters.items():
        along = rng.normal(parameter.shape, 0, "direction", name)
        values, middle = [], parameter.detach().clone()
        for step in (0.01, -0.01):
            with torch.no_grad():
                parameter.copy_(middle + step * along)
                values.append(float(loss()))
        with torch.no_grad():
            parameter.copy_(middle)
        assert (values[0] - values[1]) / 0.02 == pytest.approx(float((parameter.grad * along).sum()), rel=5e-3)


@BOTH
@pytest.mark.parametrize("lengths", [(3,) * 10, (2, 4) * 5])
def test_at_the_start_every_score_is_exactly_0(one_graph, lengths):
    seen = []
    toy = Toy(MemoryRankings(lengths), one_graph=one_graph)
    loss = lambda scores, phi: (seen.append(scores.detach()), toy.loss(scores, phi))[1]  # noqa: E731
    record = next(toy.steps(loss=loss))
    assert all((scores == 0).all() for scores in seen) and sum(len(scores) for scores in seen) == 4
    assert record.loss == pytest.approx(math.log(2) * record.metrics["pair_weight"], rel=1e-6)
    names = ("winner_error_gap", "loser_error_gap", "margin_p05", "margin_p95")
    assert record.metrics["implicit_accuracy"] == 0.5 and {record.metrics[name] for name in names} == {0}


@BOTH
def test_a_policy_that_differs_at_the_start_is_refused_before_any_update(one_graph):
    toy = Toy(moved=1e-3, one_graph=one_graph)
    before = toy.weights()
    with pytest.raises(RuntimeError, match="already differs from its.*rounding explains 0.*dropout in the model"):
        next(toy.steps())
    assert all(torch.equal(before[name], weight) for name, weight in toy.weights().items())
    assert next(toy.steps(Progress(step=5, samples=20))).step == 6


def test_two_pictures_are_diffusion_dpo_with_a_weight():
    """The same pairs through `train_pairs`, its loss times 1 / log 2 - 1 / log 3, for several steps."""
    weight = 1 / math.log(2) - 1 / math.log(3)
    pairs = MemoryPairs()
    pairs.lengths, pairs.relevance = [2] * len(pairs), [[1.0, 0.0]] * len(pairs)
    toy = Toy(pairs, shared_noise=True)
    run = make_run(loss=on_margin(lambda margin: weight * logistic(margin, BETA)), warmup=0, total=100, max_steps=8)
    for mine, theirs in zip(toy.steps(), run.steps(), strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        for name in ("implicit_accuracy", "winner_error_gap", "loser_error_gap", "margin_p05", "margin_p95"):
            assert mine.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-3, abs=1e-6), name
    for name, weights in run.weights().items():
        assert torch.allclose(weights, toy.weights()[name], atol=1e-6)


def test_the_order_of_the_pictures_does_not_matter():
    """With shared noise nothing else tells them apart; where two are equally relevant either order is as good."""

    def end(order):
        cache = MemoryRankings()
        cache.relevance = [[shares[i] for i in order] for shares in cache.relevance]
        cache.latents = [latents[list(order)] for latents in cache.latents]
        toy = Toy(cache, shared_noise=True)
        return [record.loss for record in toy.steps()], toy.weights()

    (losses, weights), (other_losses, other_weights) = end((0, 1, 2)), end((2, 0, 1))
    assert losses == pytest.approx(other_losses, rel=1e-5)
    assert all(torch.allclose(weights[name], other_weights[name], atol=1e-5) for name in weights)


@BOTH
def test_gradients_of_a_list_sum_to_0_and_ties_have_none(one_graph):
    cache = MemoryRankings()
    cache.relevance = [[0.5, 1.0, 0.5]] * 5 + [[0.25, 0.25, 0.25]] * 5
    slopes, phis = [], []

    def loss(scores, phi):
        scores.register_hook(slopes.append)
        phis.append(phi)
        return Toy().loss(scores, phi)

    next(Toy(cache, moved=0.1, one_graph=one_graph, check_start=False, batch_size=10).steps(loss=loss))
    slope, tied = slopes[0], (phis[0] == 0.25).all(1)
    assert tied.sum() == 5 and (slope[tied] == 0).all()
    assert slope[~tied].sum(1).abs().max() < 1e-7 * slope.abs().max() * 10
    assert (slope[~tied][:, 1] < 0).all() and (slope[~tied][:, ::2] > 0).all()  # descent raises the best one's score


def test_numbers_of_network_evaluations():
    """2 K of the networks a prompt; with one graph at a time K more of the policy, one slot of the lists in each."""

    def calls(one_graph):
        seen = []
        toy = Toy(MemoryRankings((3,) * 10), one_graph=one_graph, max_steps=1, accumulation=2)

        def spy(network, name):
            return lambda x, t, text: (seen.append((name, len(x), torch.is_grad_enabled())), network(x, t, text))[1]

        list(toy.steps(predict_policy=spy(toy.network, "policy"), predict_reference=spy(toy.reference, "reference")))
        return seen

    assert calls(False) == [("reference", 6, False), ("policy", 6, True)] * 2
    one = calls(True)
    assert one == ([("reference", 2, False), ("policy", 2, True)] * 3 + [("policy", 2, True)] * 3) * 2
    assert sum(rows for _, rows, _ in one) == 3 * 3 * 4  # 3 K for each of 4 prompts


def test_activations_are_those_of_one_picture():
    """Bytes of hidden activations that are alive: K times as many, or those of one picture of each list."""
    wide = (rng.normal((32, 512), 0, "wide") / 6).requires_grad_()

    def peak(k, one_graph):
        alive, peaks = [], [0]

        def predict(x, t, text):
            hidden = torch.tanh(x.flatten(1) @ wide)
            if hidden.requires_grad:
                alive.append((StorageWeakRef(hidden.untyped_storage()), hidden.untyped_storage().nbytes()))
            peaks.append(sum(size for storage, size in alive if not storage.expired()))
            return (hidden @ wide.T).view_as(x)

        latents, text = rng.normal((2, k, *SHAPE), 0, "x"), torch.zeros(2, *TEXT)
        made = noised_lists(latents, text, [(0, 0), (0, 1)], SCHEDULE, "epsilon", 0, shared_noise=False)
        scores = ranking_scores(predict, predict, made, one_graph=one_graph)
        rank_dpo(scores, torch.linspace(1, 0, k).expand(2, k), 1.0).sum().backward()
        return max(peaks)

    picture = 2 * 512 * 4  # of both lists
    assert {k: peak(k, True) for k in (2, 8)} == {2: picture, 8: picture}
    assert {k: peak(k, False) for k in (2, 8)} == {2: 2 * picture, 8: 8 * picture}


def test_in_half_precision_both_ways_agree():
    toy = Toy(moved=0.1)
    made = noised_lists(
        *toy.cache.batch(range(4)), [(0, i) for i in range(4)], SCHEDULE, "epsilon", SEED, shared_noise=False
    )
    phi = torch.tensor(toy.cache.relevance[:4])
    found = []
    for one_graph in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            scores = ranking_scores(toy.network, toy.reference, made, one_graph=one_graph)
            start = ranking_scores(toy.reference, toy.reference, made, one_graph=one_graph)
        gradients = torch.autograd.grad(toy.loss(scores, phi).sum(), list(toy.parameters.values()))
        assert scores.dtype == torch.float32 and (start == 0).all()
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_noise_is_each_pictures_own_and_drawn_by_address():
    cache = MemoryRankings()
    make = partial(noised_lists, schedule=SCHEDULE, prediction_type="epsilon", seed=SEED)
    made = make(*cache.batch([4, 7]), [(1, 4), (1, 7)], shared_noise=False)
    assert made.t.view(3, 2).unique(dim=0).shape[0] == 1 and made.t[0] != made.t[1]
    noise = made.target.view(3, 2, *SHAPE)
    for entry, (row, index) in itertools.product(range(3), enumerate((4, 7))):
        assert torch.equal(noise[entry, row], rng.normal(SHAPE, SEED, "noise", 1, index, entry))
    alone = make(*cache.batch([7]), [(1, 7)], shared_noise=False)
    assert torch.equal(alone.x, made.x[1::2]) and torch.equal(alone.text, made.text[1::2])
    shared = make(*cache.batch([4, 7]), [(1, 4), (1, 7)], shared_noise=True)
    dpo = noised_lists(*cache.batch([4, 7]), [(1, 4), (1, 7)], SCHEDULE, "epsilon", SEED)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(shared[:4], dpo[:4], strict=True))
    assert torch.equal(shared.t, made.t) and shared.target.view(3, 2, *SHAPE).unique(dim=0).shape[0] == 1


def test_metrics_are_those_of_the_scores():
    """Two pairs of three right by weight, by hand from the scores of a policy that is not its reference."""
    toy = Toy(moved=0.3, check_start=False)
    _, scores, totals, _ = by_hand(toy, shared_noise=False)
    order = [i for _, i in samples_at(0, 4, 10, SEED)]
    right = 0.0
    for row, index in zip(scores, order, strict=True):
        weights = gain_weights(torch.tensor([toy.cache.relevance[index]], dtype=torch.float64))[0]
        for i, j in ((0, 1), (0, 2), (1, 2)):  # relevance falls along the list
            right += float(weights[i, j]) * (float(row[i] < row[j]) + 0.5 * float(row[i] == row[j]))
    stacked = torch.stack(scores).double()
    margin = BETA * (stacked[:, 2] - stacked[:, 0])
    metrics = next(toy.steps()).metrics
    assert metrics["implicit_accuracy"] == pytest.approx(right / sum(totals), rel=1e-6)
    assert 0 < metrics["implicit_accuracy"] < 1
    assert metrics["winner_error_gap"] == pytest.approx(float(stacked[:, 0].mean()) / 32, rel=1e-4)
    assert metrics["loser_error_gap"] == pytest.approx(float(stacked[:, 2].mean()) / 32, rel=1e-4)
    assert metrics["margin_p05"] == pytest.approx(float(margin.quantile(0.05)), rel=1e-3)
    assert metrics["margin_p50"] == pytest.approx(float(margin.quantile(0.5)), rel=1e-3)


@BOTH
def test_training_prefers_the_better_ones(one_graph):
    records = list(Toy(trained=("base",), batch_size=10, max_steps=80, one_graph=one_graph, shared_noise=True).steps())
    last = records[-20:]
    assert sum(record.metrics["implicit_accuracy"] for record in last) / 20 > 0.75
    assert all(record.metrics["winner_error_gap"] < record.metrics["loser_error_gap"] for record in last)


def test_captions_are_dropped():
    texts = []
    toy = Toy(caption_dropout=1.0, max_steps=1)
    list(toy.steps(predict_policy=lambda x, t, text: (texts.append(text), toy.network(x, t, text))[1]))
    assert (texts[0] == toy.cache.empty_text).all()


@BOTH
@pytest.mark.parametrize("lengths", [(3,) * 10, (4, 2, 3, 2, 4, 4, 3, 2)])
def test_a_resumed_run_is_the_uninterrupted_one(one_graph, lengths, tmp_path):
    make = lambda: Toy(MemoryRankings(lengths), one_graph=one_graph, accumulation=2)  # noqa: E731
    whole = make()
    rows = [record.row() for record in whole.steps()]
    for stop in (1, 3, 6):
        first = make()
        record = list(itertools.islice(first.steps(), stop))[-1]
        saved = checkpoint.save(tmp_path / str(stop), stop, *first.packed(record.progress))
        second = make()
        progress = restore(checkpoint.load(saved), second.parameters, second.optimizer, second.lr_scheduler)
        assert [record.row() for record in second.steps(progress)] == rows[stop:]
        assert all(torch.equal(weight, whole.weights()[name]) for name, weight in second.weights().items())


def test_two_processes_are_accumulation_2_bit_for_bit(tmp_path):
    lengths = (4, 2, 3, 2, 4, 4, 3, 2)

    def work(rank):
        toy = Toy(MemoryRankings(lengths), one_graph=True)
        rows = [list(record.row().values()) for record in toy.steps()]
        save_file(toy.weights() | {"rows": torch.tensor(rows, dtype=torch.float64)}, tmp_path / f"{rank}.safetensors")

    assert in_processes(2, work)
    alone = Toy(MemoryRankings(lengths), one_graph=True, accumulation=2)
    rows = torch.tensor([list(record.row().values()) for record in alone.steps()], dtype=torch.float64)
    for rank in range(2):
        both = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.equal(both.pop("rows"), rows)
        assert all(torch.equal(both[name], weight) for name, weight in alone.weights().items())


def test_relevance_must_fit_the_cache():
    toy = Toy()
    toy.cache.relevance = toy.cache.relevance[1:]
    with pytest.raises(ValueError, match="relevance of 9 rankings does not fit the 10 in the cache"):
        toy.steps()
    toy = Toy()
    toy.cache.relevance[3] = [1.0, 0.0]
    with pytest.raises(ValueError, match="or their K"):
        toy.steps()
