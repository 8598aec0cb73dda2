"""KTO on single pictures: against its formula in plain autograd, and whole however a batch is cut."""

import math

import pytest
import torch
from accelerate import Accelerator
from helpers_memory import Limited
from helpers_train import BETA, SCHEDULE, SHAPE, MemoryPairs, in_processes, make_run, train_pictures
from safetensors.torch import load_file, save_file

from diffusion_align import rng
from diffusion_align.methods.kto import baseline_of, liked_of
from diffusion_align.methods.shared.pair_losses import kto_of_pairs

SEED, SHARE, DIMS = 3, 0.43, math.prod(SHAPE)


def pictures_run(disturbed=True, loss=None, **settings):
    """A run on single pictures, in float64 so that no rounding is in the way; `disturbed`: policy is not reference."""
    run = make_run(optimizer="sgd", warmup=0, **{"batch_size": 8, "check_start": False, "max_steps": 3} | settings)
    for network in (run.network, run.reference):
        network.double()
    run.settings["cache"].latents = run.settings["cache"].latents.double()
    run.settings["cache"].text = run.settings["cache"].text.double()
    if disturbed:
        with torch.no_grad():
            run.network.up.copy_(0.1 * rng.normal(run.network.up.shape, 0, "disturb"))
    return run


def steps(run, **changes):
    settings = {name: value for name, value in (run.settings | changes).items() if name != "loss"}
    policy = settings.pop("predict_policy", run.network)
    return train_pictures(
        settings.pop("cache"), policy, run.reference, liked_share=SHARE, parameters=list(run.parameters.values()),
        optimizer=run.optimizer, lr_scheduler=None, **settings,
    )  # fmt: skip


def by_hand(run):
    """The first step's log-ratios, labels and mean loss, written out: Li et al. 2024 with the authors' baseline."""
    cache = run.settings["cache"]
    order = rng.permutation(len(cache), SEED, "shuffle", 0)[:8].tolist()
    at = [(0, i) for i in order]
    liked = rng.uniform_batch(SEED, "liked", at) < SHARE
    clean = torch.stack([cache.latents[i, 0 if good else 1] for i, good in zip(order, liked, strict=True)])
    t, noise = rng.integers_batch(0, 1000, SEED, "timestep", at), rng.normal_batch(SHAPE, SEED, "noise", at).double()
    a, s = (level.view(-1, 1, 1, 1) for level in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    x, text = a * clean + s * noise, cache.text[order]
    policy, reference = (
        (network(x, t, text) - noise).square().flatten(1).sum(1) for network in (run.network, run.reference)
    )
    gain = reference - policy
    centred = BETA * (gain - gain.detach().mean().clamp(min=0))
    return gain, liked, torch.where(liked, 1 - torch.sigmoid(centred), 1 - torch.sigmoid(-centred)).mean()


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_the_loss_and_its_gradient_are_the_formulas_however_the_batch_is_cut(accumulation):
    run = pictures_run(accumulation=accumulation, max_steps=1, max_grad_norm=None)
    gain, liked, wanted = by_hand(run)
    assert 0 < liked.sum() < 8 and gain.mean().abs() > 0.01
    expected = torch.autograd.grad(wanted, list(run.parameters.values()))
    before = run.weights()
    (record,) = steps(run)
    # float32 errors (the loop's own precision) of about DIMS, at a slope of BETA / 4
    assert record.loss == pytest.approx(float(wanted.detach()), abs=1e-5)
    for (name, weight), gradient in zip(run.weights().items(), expected, strict=True):
        assert ((before[name] - weight) / 0.02 - gradient).norm() < 1e-5 * gradient.norm()  # 0.02: the rate of the SGD
    gap = -gain.detach() / DIMS
    assert record.metrics["winner_error_gap"] == pytest.approx(float(gap[liked].mean()), abs=1e-6)
    assert record.metrics["loser_error_gap"] == pytest.approx(float(gap[~liked].mean()), abs=1e-6)
    assert record.metrics["implicit_accuracy"] == float(((gain > 0) == liked).double().mean())
    assert record.metrics["baseline_logit"] == pytest.approx(BETA * max(0.0, float(gain.detach().mean())), abs=1e-5)


def better_than_the_reference(run):
    """Move the policy towards its targets, so that the baseline is above 0 and matters."""
    run.reference.base.data *= 1.5
    return run


def test_the_baseline_covers_the_batch_not_a_micro_batch():
    """Four pieces end where one does; on pairs, with a baseline of each piece, they do not."""
    runs = [better_than_the_reference(pictures_run(accumulation=cut, max_steps=4)) for cut in (1, 4)]
    rows = [[record.row() for record in steps(run)] for run in runs]
    assert rows[0][0]["baseline_logit"] > 0.05
    for one, four in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(four["loss"], abs=1e-5)
        assert one["baseline_logit"] == pytest.approx(four["baseline_logit"], abs=1e-5)
    for name, weight in runs[0].weights().items():
        torch.testing.assert_close(runs[1].weights()[name], weight, rtol=1e-4, atol=1e-6)
    pairs = [better_than_the_reference(pictures_run(loss=None, accumulation=cut, max_steps=1)) for cut in (1, 4)]
    losses = [next(run.steps(loss=kto_of_pairs(BETA))).loss for run in pairs]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_two_processes_do_what_one_does(tmp_path):
    def work(rank):
        run = better_than_the_reference(pictures_run(accelerator=Accelerator(cpu=True), accumulation=2))
        losses = torch.tensor([record.loss for record in steps(run)])
        save_file(run.weights() | {"losses": losses}, tmp_path / f"{rank}.safetensors")

    assert in_processes(2, work)
    alone = better_than_the_reference(pictures_run())
    losses = torch.tensor([record.loss for record in steps(alone)])
    for rank in range(2):
        both = load_file(tmp_path / f"{rank}.safetensors")
        torch.testing.assert_close(both.pop("losses"), losses, rtol=0, atol=1e-5)
        for name, weight in alone.weights().items():
            torch.testing.assert_close(both[name], weight, rtol=1e-4, atol=1e-6)


def test_memory_that_runs_out_changes_no_baseline(caplog):
    runs = [better_than_the_reference(pictures_run()) for _ in range(2)]
    whole = [record.loss for record in steps(runs[0])]
    cut = [record.loss for record in steps(runs[1], predict_policy=Limited(runs[1].network, 4))]
    assert cut == pytest.approx(whole, abs=1e-5) and "out of memory" in caplog.text


def test_each_picture_is_called_once_and_looked_at_once_more_only_where_the_batch_is_cut():
    for accumulation, policy_rows in ((1, 8), (4, 16)):
        rows = {"policy": 0, "reference": 0}
        run = pictures_run(accumulation=accumulation, max_steps=1)

        def counted(name, network, rows=rows):
            def call(x, t, text):
                rows[name] += len(x)
                return network(x, t, text)

            return call

        run.reference = counted("reference", run.reference)
        list(steps(run, predict_policy=counted("policy", run.network)))
        assert rows == {"policy": policy_rows, "reference": 8}


def test_the_fraction_of_liked_pictures_and_separate_timesteps():
    visits = [(epoch, index) for epoch in range(400) for index in range(10)]
    for share in (0.5, 0.8):
        assert abs(float(liked_of(visits, share, SEED).double().mean()) - share) < 0.025  # 3.2 deviations and more
    assert bool(liked_of(visits, 1.0, SEED).all()) and not bool(liked_of(visits, 0.0, SEED).any())
    assert float(baseline_of(torch.tensor([-3.0, 1.0]))) == 0 and float(baseline_of(torch.tensor([3.0, 1.0]))) == 2


def test_it_starts_at_one_half_and_refuses_another_start():
    run = pictures_run(disturbed=False, check_start=True)
    assert next(steps(run)).loss == 0.5
    with pytest.raises(RuntimeError, match="already differs from its reference"):
        next(steps(pictures_run(check_start=True)))
    with pytest.raises(ValueError, match="liked_share must lie"):
        settings = {k: v for k, v in run.settings.items() if k not in ("cache", "loss")}
        settings |= {"parameters": list(run.parameters.values()), "optimizer": run.optimizer, "lr_scheduler": None}
        train_pictures(MemoryPairs(), run.network, run.reference, liked_share=1.2, **settings)
