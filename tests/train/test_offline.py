"""Diffusion-DPO's loop against plain torch and diffusers, its start, its bad numbers, and its processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers_train import (
    BETA,
    SCHEDULE,
    SD_CONFIG,
    SHAPE,
    MemoryPairs,
    in_processes,
    make_run,
    noised_lists,
    run_steps,
    train_pairs,
)
from safetensors.torch import load_file, save_file

from diffusion_align import rng
from diffusion_align.methods.shared import noising
from diffusion_align.methods.shared.pair_losses import PairLoss, margin_of, on_margin
from diffusion_align.train.run import Progress
from diffusion_align.train.steps import samples_at
from diffusion_align.train.update import NonFiniteError

SEED = 3


def plain_step(run, prediction_type, lr, max_grad_norm):
    """The first step of Diffusion-DPO as the authors' code has it: per-dim means, a half, and its own schedule."""
    cache, dims = run.settings["cache"], math.prod(SHAPE)
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    order = rng.permutation(len(cache), SEED, "shuffle", 0)[:4].tolist()
    winner, loser = cache.latents[order, 0], cache.latents[order, 1]
    t = rng.integers_batch(0, 1000, SEED, "timestep", [(0, i) for i in order])
    noise = rng.normal_batch(SHAPE, SEED, "noise", [(0, i) for i in order])
    a, s = alphas[t].sqrt().float().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().float().view(-1, 1, 1, 1)

    def errors(network, clean):
        wanted = {"epsilon": noise, "sample": clean, "v_prediction": a * noise - s * clean}[prediction_type]
        return F.mse_loss(network(a * clean + s * noise, t, cache.text[order]), wanted, reduction="none").mean(
            (1, 2, 3)
        )

    policy = errors(run.network, winner) - errors(run.network, loser)
    reference = errors(run.reference, winner) - errors(run.reference, loser)
    beta = 2 * dims * BETA  # the authors' beta, which is for means and halved
    loss = -F.logsigmoid(-beta / 2 * (policy - reference)).mean()
    gradients = torch.autograd.grad(loss, list(run.parameters.values()))
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    scale = min(1.0, max_grad_norm / float(norm))
    return float(norm), {n: p - lr * scale * g for (n, p), g in zip(run.parameters.items(), gradients, strict=True)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("max_grad_norm", [0.01, 1e6])
def test_the_first_step_is_the_hand_written_one(mode, prediction_type, max_grad_norm):
    run = make_run(mode, optimizer="sgd", warmup=0, prediction_type=prediction_type, max_grad_norm=max_grad_norm)
    norm, expected = plain_step(run, prediction_type, 0.02, max_grad_norm)
    start = run.weights()
    record = next(run.steps())
    assert record.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.01
    for name, weight in run.weights().items():
        moved = (expected[name] - start[name]).abs().max()
        assert (weight - expected[name]).abs().max() <= 1e-4 * moved + 1e-8
    assert any((run.weights()[name] - start[name]).abs().max() > 0 for name in start)


def test_the_loss_at_the_start_is_log_2_and_every_margin_exactly_0():
    record = next(make_run().steps())
    assert record.loss == pytest.approx(math.log(2), rel=4 * 2**-23)  # a logarithm and a mean, in float32
    assert record.metrics["implicit_accuracy"] == 0.5
    assert record.metrics["margin_p05"] == record.metrics["margin_p95"] == record.metrics["winner_error_gap"] == 0
    assert (record.step, record.epoch, record.metrics["samples"], record.updated) == (1, 0, 4, True)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_noise_and_target_are_those_of_diffusers(prediction_type):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(**{k: v for k, v in SD_CONFIG.items() if k != "_class_name"})
    cache, samples = MemoryPairs(8), [(2, i) for i in range(8)]
    made = noised_lists(*cache.batch(range(8)), samples, SCHEDULE, prediction_type, SEED)
    clean = torch.cat([cache.latents[:, 0], cache.latents[:, 1]])
    noise = rng.normal_batch(SHAPE, SEED, "noise", samples).repeat(2, 1, 1, 1)
    velocity = theirs.get_velocity(clean, noise, made.t)
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction_type]
    # Two rounded factors, two products and a sum in float32, here and there: 8 half ulps (2^-24) of terms up to 8.
    torch.testing.assert_close(made.x, theirs.add_noise(clean, noise, made.t), rtol=0, atol=4e-6)
    torch.testing.assert_close(made.target, wanted, rtol=0, atol=4e-6)
    assert torch.stack([clean, noise]).abs().max() < 4
    assert torch.equal(made.text, torch.cat([cache.text, cache.text]))


def test_noise_and_timestep_are_shared_in_the_pair_and_drawn_by_address():
    cache = MemoryPairs()
    batch = cache.batch([4, 7])
    made = noised_lists(*batch, [(1, 4), (1, 7)], SCHEDULE, "epsilon", SEED)
    assert torch.equal(made.t[:2], made.t[2:]) and torch.equal(made.target[:2], made.target[2:])
    assert not torch.equal(made.target[0], made.target[1]) and made.t[0] != made.t[1]
    alone = noised_lists(*cache.batch([7]), [(1, 7)], SCHEDULE, "epsilon", SEED)
    assert torch.equal(alone.x, made.x[1::2]) and torch.equal(alone.t, made.t[1::2])
    later = noised_lists(*batch, [(2, 4), (2, 7)], SCHEDULE, "epsilon", SEED)
    assert not torch.equal(later.target, made.target)


def test_timesteps_are_uniform_over_all():
    samples = [(e, i) for e in range(8) for i in range(500)]
    t = noised_lists(torch.zeros(4000, 2, 1), torch.zeros(4000, 1, 1), samples, SCHEDULE, "epsilon", 0).t[:4000]
    assert t.min() >= 0 and t.max() <= 999 and t.min() < 5 and t.max() > 994
    counts = torch.histc(t.float(), 10, 0, 1000)
    assert ((counts - 400).square() / 400).sum() < 27.9  # chi-square with 9 degrees of freedom, one in a thousand


def test_lists_of_any_length_have_their_errors_in_place():
    latents = rng.normal((3, 5, *SHAPE), 0, "lists")
    made = noised_lists(latents, torch.zeros(3, 1, 1), [(0, i) for i in range(3)], SCHEDULE, "sample", SEED)
    errors = noising.denoising_errors(lambda x, t, text: torch.zeros_like(x), made)
    assert torch.allclose(
        errors, latents.square().sum((2, 3, 4))
    )  # against the answer 0, the error is the target's size


def test_each_micro_batch_calls_each_network_once_winners_first():
    calls = []
    run = make_run(accumulation=2, batch_size=6, max_steps=1)

    def spy(network, name):
        return lambda x, t, text: (calls.append((name, len(x), torch.is_grad_enabled())), network(x, t, text))[1]

    run.reference = spy(run.reference, "reference")
    list(run.steps(predict_policy=spy(run.network, "policy")))
    assert calls == [("reference", 6, False), ("policy", 6, True)] * 2


def test_training_prefers_the_winners():
    records = list(make_run("full", batch_size=10, max_steps=80, warmup=0, total=200).steps())
    last = records[-20:]
    assert sum(record.loss for record in last) / 20 < 0.5
    assert sum(record.metrics["implicit_accuracy"] for record in last) / 20 > 0.75
    for record in last:
        assert record.metrics["margin_p05"] < record.metrics["margin_p50"] < record.metrics["margin_p95"]
        assert record.metrics["winner_error_gap"] < record.metrics["loser_error_gap"]


def test_weights_scale_each_pairs_share_of_the_step():
    """One step over all pairs moves the network by the weighted sum of what each pair alone moves it by."""
    count = 4

    def moved(weights):
        run = make_run(
            optimizer="sgd", warmup=0, cache=MemoryPairs(count), batch_size=count, max_grad_norm=None, weights=weights
        )
        start = run.weights()["up"]
        record = next(run.steps())
        return run.weights()["up"] - start, record.loss

    alone = [moved([float(i == j) for j in range(count)])[0] for i in range(count)]
    weights = [0.5, 0.0, 2.0, 1.0]
    together, loss = moved(weights)
    expected = sum(w * step for w, step in zip(weights, alone, strict=True))
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-8)
    assert all(float(step.abs().max()) > 1e-5 for step in alone)
    assert loss == pytest.approx(math.log(2) * sum(weights) / count)
    assert torch.equal(moved(None)[0], moved([1.0] * count)[0])


@pytest.mark.parametrize("same", range(4))
def test_a_weight_is_that_of_its_pair_whatever_the_order_of_the_epoch(same):
    """Two equal pictures teach nothing, so a step that weighs only their pair moves nothing, and no other does so."""
    for weighed in range(4):
        cache = MemoryPairs(4)
        cache.latents[same, 1] = cache.latents[same, 0]
        weights = [float(weighed == j) for j in range(4)]
        run = make_run(optimizer="sgd", warmup=0, cache=cache, batch_size=4, max_grad_norm=None, weights=weights)
        start = run.weights()["up"]
        next(run.steps())
        assert (float((run.weights()["up"] - start).abs().max()) < 1e-7) == (weighed == same)


@pytest.mark.parametrize("weights", [[1.0] * 9, [1.0] * 9 + [-0.1], [1.0] * 9 + [math.nan]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="expected 10 weights, finite and not below 0, one per pair"):
        next(make_run(weights=weights).steps())


def test_metrics_are_the_means_of_the_step():
    """Against errors computed outside the loop for a policy that is not its reference."""
    run = make_run(check_start=False)
    with torch.no_grad():
        run.network.up += 0.1
    cache, samples = run.settings["cache"], samples_at(0, 4, 10, SEED)
    made = noised_lists(*cache.batch([i for _, i in samples]), samples, SCHEDULE, "epsilon", SEED)
    with torch.no_grad():
        policy, reference = (
            (f(made.x, made.t, made.text) - made.target).square().sum((1, 2, 3)) for f in (run.network, run.reference)
        )
    gap = (policy - reference).double()
    margin = BETA * (gap[4:] - gap[:4])
    record = next(run.steps())
    assert record.loss == pytest.approx(float(F.softplus(-margin).mean()), rel=1e-5)
    assert record.metrics["winner_error_gap"] == pytest.approx(float(gap[:4].mean()) / 32, rel=1e-4)
    assert record.metrics["loser_error_gap"] == pytest.approx(float(gap[4:].mean()) / 32, rel=1e-4)
    assert record.metrics["margin_p05"] == pytest.approx(float(margin.quantile(0.05)), rel=1e-3)
    assert record.metrics["implicit_accuracy"] == (margin > 0).double().mean()


def test_a_policy_that_differs_at_the_start_is_refused_before_any_update():
    run = make_run()
    with torch.no_grad():
        run.network.up[0, 0] = 1e-3
    before = run.weights()
    with pytest.raises(RuntimeError, match="already differs from its.*rounding explains 0.*dropout in the model"):
        next(run.steps())
    assert all(torch.equal(before[name], weight) for name, weight in run.weights().items())
    assert next(run.steps(check_start=False)).loss != math.log(2)
    assert next(run.steps(Progress(step=5, samples=20))).step == 6  # on resuming it has every right to differ


def test_captions_are_dropped_by_address():
    cache = MemoryPairs(10)
    samples = [(e, i) for e in range(200) for i in range(10)]
    text = cache.text.repeat(200, 1, 1)
    dropped = (noising.drop_captions(text, cache.empty_text, samples, 0.2, SEED) == cache.empty_text).all(-1).all(-1)
    assert abs(dropped.double().mean() - 0.2) < 0.03  # 3.4 deviations
    few = noising.drop_captions(text[:10], cache.empty_text, samples[:10], 0.2, SEED)
    assert torch.equal((few == cache.empty_text).all(-1).all(-1), dropped[:10])
    assert torch.equal(noising.drop_captions(text, cache.empty_text, samples, 0.0, SEED), text)
    assert (noising.drop_captions(text, cache.empty_text, samples, 1.0, SEED) == cache.empty_text).all()
    kept = few[~dropped[:10]]
    assert torch.equal(kept, text[:10][~dropped[:10]])


def test_caption_dropout_reaches_the_networks():
    texts = []
    run = make_run(caption_dropout=1.0, max_steps=1)
    list(run.steps(predict_policy=lambda x, t, text: (texts.append(text), run.network(x, t, text))[1]))
    assert (texts[0] == run.settings["cache"].empty_text).all()


def test_the_stream_visits_every_sample_once_an_epoch():
    stream = samples_at(0, 35, 10, SEED)
    for epoch in range(3):
        part = stream[10 * epoch : 10 * epoch + 10]
        assert {e for e, _ in part} == {epoch} and sorted(i for _, i in part) == list(range(10))
    assert [i for _, i in stream[:10]] != [i for _, i in stream[10:20]]
    assert samples_at(7, 20, 10, SEED) == stream[7:27]
    assert [e for e, _ in samples_at(0, 7, 2, SEED)] == [0, 0, 1, 1, 2, 2, 3]  # a batch may hold several epochs


def spoil(network, steps, calls_per_step=1, value=math.nan):
    """The policy, with one output spoilt in these steps (from 1)."""
    seen = [0]

    def predict(x, t, text):
        seen[0] += 1
        out = network(x, t, text)
        return torch.cat([out[:1] * value, out[1:]]) if (seen[0] - 1) // calls_per_step + 1 in steps else out

    return predict


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_steps_with_bad_losses_are_skipped_and_counted(value):
    run = make_run(accumulation=2, ema=True)
    weights = [run.weights()]
    records = []
    for record in run.steps(predict_policy=spoil(run.network, {1, 4, 5, 9}, 2, value)):
        records.append(record)
        weights.append(run.weights())
    assert [r.step for r in records if not r.updated] == [1, 4, 5, 9]
    assert [r.progress.skipped for r in records] == [1, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert [r.progress.skipped_in_row for r in records] == [1, 0, 0, 1, 2, 0, 0, 0, 1, 0, 0, 0]
    for before, after, record in zip(weights, weights[1:], records, strict=False):
        changed = any(not torch.equal(before[name], after[name]) for name in before)
        # The first update of a warm-up has a learning rate of 0.
        assert changed == (record.updated and record.metrics["lr"] > 0)
        assert all(weight.isfinite().all() for weight in after.values())
    assert run.ema.updates == 8 and run.lr_scheduler.last_epoch == 8
    assert all(state["step"] == 8 for state in run.optimizer.state.values())


def test_a_bad_gradient_behind_a_good_loss_is_skipped_too():
    run = make_run(max_steps=3)
    count = [0]

    def hook(gradient):
        count[0] += 1
        return gradient * math.inf if count[0] == 2 else gradient

    run.network.up.register_hook(hook)
    records = list(run.steps())
    assert [record.updated for record in records] == [True, False, True]
    assert math.isfinite(records[1].loss) and not math.isfinite(records[1].metrics["grad_norm"])
    assert all(weight.isfinite().all() for weight in run.weights().values())


def test_a_bad_loss_with_good_gradients_is_skipped_too():
    run = make_run(loss=PairLoss(lambda pairs: margin_of(pairs) + math.inf), max_steps=2)
    before = run.weights()
    first, second = run.steps()
    assert not first.updated and not second.updated and math.isfinite(first.metrics["grad_norm"])
    assert all(torch.equal(before[name], weight) for name, weight in run.weights().items())


def test_five_bad_steps_in_a_row_stop_the_run():
    run = make_run()
    records = []
    with pytest.raises(NonFiniteError, match="steps 3 to 7 each had a loss or gradient that is not finite.*Lower"):
        for record in run.steps(predict_policy=spoil(run.network, {3, 4, 5, 6, 7})):
            records.append(record)
    assert records[-1].progress == Progress(step=7, samples=28, skipped=5, skipped_in_row=5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"batch_size": 6, "accumulation": 4}, "batch_size 6 .* accumulation 4 x processes 1 = 4 equal micro-batches"),
        ({"max_steps": 0}, "must be positive"),
        ({"cache": MemoryPairs(0)}, "the data set is empty"),
    ],
)
def test_settings_that_do_not_fit(settings, reason):
    with pytest.raises(ValueError, match=reason):
        next(make_run(**settings).steps())


def test_an_accelerator_that_accumulates_is_refused():
    run = make_run()
    run.settings["accelerator"] = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="the loop itself accumulates"):
        next(run.steps())


def test_parameters_that_do_not_train_are_refused():
    run = make_run()
    run.network.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad False"):
        next(run.steps())


def test_an_accelerated_scheduler_is_refused():
    run = make_run()
    run.lr_scheduler = run.settings["accelerator"].prepare(run.lr_scheduler)
    with pytest.raises(ValueError, match="plain scheduler"):
        next(run.steps())


def test_accumulation_changes_only_the_rounding():
    whole, cut = make_run(optimizer="sgd"), make_run(optimizer="sgd", accumulation=4)
    for one, four in zip(whole.steps(), cut.steps(), strict=True):
        assert one.loss == pytest.approx(four.loss, rel=1e-5)
        assert one.metrics["grad_norm"] == pytest.approx(four.metrics["grad_norm"], rel=1e-4)
    for name, weight in whole.weights().items():
        assert torch.allclose(weight, cut.weights()[name], atol=1e-6)


def test_two_processes_are_accumulation_2_bit_for_bit(tmp_path):
    def work(rank):
        run = make_run(accelerator=Accelerator(cpu=True), caption_dropout=0.3)
        assert run.settings["accelerator"].num_processes == 2
        rows = [list(record.row().values()) for record in run.steps()]
        values = {"rows": torch.tensor(rows, dtype=torch.float64)}
        save_file(run.weights() | values, tmp_path / f"{rank}.safetensors")

    assert in_processes(2, work)
    alone = make_run(accumulation=2, caption_dropout=0.3)
    rows = torch.tensor([list(record.row().values()) for record in alone.steps()], dtype=torch.float64)
    for rank in range(2):
        both = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.equal(both.pop("rows"), rows)
        for name, weight in alone.weights().items():
            assert torch.equal(both[name], weight)


def test_two_processes_that_accumulate_see_the_same_samples(tmp_path):
    """Sums are taken in another order, so the last bit may differ; the samples of a step and their order may not."""

    def losses(**options):
        return torch.tensor([record.loss for record in make_run(optimizer="sgd", **options).steps()])

    def order(accelerator):
        """The samples of 5 steps, as they come back from all processes."""
        weight, seen = torch.nn.Parameter(torch.ones(())), []

        def micro_batch(samples, _):
            return {"loss": weight * torch.ones(len(samples)), "index": torch.tensor([float(i) for _, i in samples])}

        optimizer = torch.optim.SGD([weight], lr=0.1)
        steps = run_steps(
            micro_batch,
            lambda columns: seen.extend(columns["index"].tolist()) or {},
            n=10,
            parameters=[weight],
            optimizer=optimizer,
            lr_scheduler=None,
            accelerator=accelerator,
            batch_size=8,
            accumulation=2,
            seed=SEED,
            max_steps=5,
            max_grad_norm=None,
            progress=Progress(),
        )
        list(steps)
        return torch.tensor(seen)

    def work(rank):
        accelerator = Accelerator(cpu=True)
        found = {"loss": losses(accelerator=accelerator, accumulation=2), "order": order(accelerator)}
        save_file(found, tmp_path / f"{rank}.safetensors")

    assert in_processes(2, work)
    alone = losses(accumulation=4)
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.allclose(found["loss"], alone, rtol=1e-5, atol=0)
        assert found["order"].tolist() == [float(i) for _, i in samples_at(0, 40, 10, SEED)]


def test_a_bad_number_on_one_process_skips_the_step_on_both(tmp_path):
    def work(rank):
        run = make_run(accelerator=Accelerator(cpu=True))
        policy = spoil(run.network, {2, 6}) if rank == 1 else run.network
        updated = [record.updated for record in run.steps(predict_policy=policy)]
        save_file(run.weights() | {"updated": torch.tensor(updated)}, tmp_path / f"{rank}.safetensors")

    assert in_processes(2, work)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first["updated"].tolist() == [step not in (2, 6) for step in range(1, 13)]
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_real_stable_diffusion_folder_trains_from_its_own_cache(tmp_path, mode):
    """Everything but the toy: pairs, cache, model, adapters, loop. The start is log 2; one small step lowers the
    loss of the very same samples."""
    from helpers_tiny import RESOLUTION, make_tiny_folder

    from diffusion_align.data import EncodingSettings, Pair, build_cache
    from diffusion_align.data.images import encode_png
    from diffusion_align.models import load_pipeline
    from diffusion_align.models.lora.adapters import add_lora, trainable
    from diffusion_align.models.lora.reference import reference
    from diffusion_align.objectives import beta_per_squared_error, logistic

    model = load_pipeline(make_tiny_folder(tmp_path / "model"))
    pictures = [encode_png(rng.normal((3, RESOLUTION, RESOLUTION), 0, "p", i).sigmoid()) for i in range(8)]
    pairs = [Pair(str(i), "a red circle", pictures[2 * i], pictures[2 * i + 1]) for i in range(4)]
    cache = build_cache(model, pairs, tmp_path / "cache", EncodingSettings(RESOLUTION), progress=False)
    if mode == "lora":
        add_lora(model.unet, rank=2)
    frozen = reference(model, mode)
    parameters = trainable(model.unet, mode)
    beta = beta_per_squared_error(5000, math.prod(model.latent_shape(RESOLUTION)), "salesforce")
    before = [parameter.detach().clone() for parameter in parameters]
    base = {name: p.detach().clone() for name, p in model.unet.named_parameters() if not p.requires_grad}

    def first_step():
        return next(
            train_pairs(
                cache,
                model.predict,
                frozen,
                schedule=model.schedule,
                prediction_type=model.prediction_type,
                loss=on_margin(lambda margin: logistic(margin, beta)),
                beta=beta,
                parameters=parameters,
                optimizer=torch.optim.SGD(parameters, lr=0.01),
                lr_scheduler=None,
                accelerator=Accelerator(cpu=True),
                batch_size=4,
                seed=SEED,
                max_steps=1,
                caption_dropout=0.2,
                check_start=all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True)),
            )
        )

    start, after = first_step(), first_step()
    assert start.loss == pytest.approx(math.log(2), rel=4 * 2**-23) and start.metrics["grad_norm"] > 0
    assert after.loss < start.loss and after.metrics["implicit_accuracy"] > 0.5
    assert all(torch.equal(p, base[name]) for name, p in model.unet.named_parameters() if name in base)
