"""Training the step-aware preference model: its loss by hand, its noise by address, and what it learns."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers_train import SCHEDULE, SHAPE, MemoryPairs, train_step_aware

from diffusion_align import rng
from diffusion_align.data import Pair
from diffusion_align.methods.shared.preferences import (
    PreferencePairs,
    accuracy_by_noise,
    predicted_pairs,
    preference_loss,
    prompt_weights,
)
from diffusion_align.train.steps import samples_at

SEED = 3
PROMPTS = ["a", "b", "a", "c", "a", "b", "d", "e", "f", "g"]  # 3 pairs of a, 2 of b, 1 of each other


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


class Scorer(torch.nn.Module):
    """A linear score of what it sees, with a slope in t."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(rng.normal(SHAPE, 5, "scorer"))
        self.slope = torch.nn.Parameter(torch.zeros(()))

    def forward(self, seen, prompts, t):
        return (seen * self.weight).flatten(1).sum(1) * (1 + self.slope * t / 1000)


def shrunk(x, t, text):
    """A base that predicts half of what it is given, and reads the text a little."""
    return x / 2 + text.mean((1, 2))[:, None, None, None]


def start(lr=0.01, **changes):
    scorer = Scorer()
    settings = {
        "schedule": SCHEDULE, "lr_scheduler": None, "accelerator": Accelerator(cpu=True), "batch_size": 4,
        "seed": SEED, "max_steps": 6, "optimizer": torch.optim.SGD(scorer.parameters(), lr=lr),
    }  # fmt: skip
    settings |= changes
    records = train_step_aware(
        MemoryPairs(), PROMPTS, settings.pop("model", scorer), settings.pop("predict", shrunk),
        settings.pop("decode", torch.tanh), parameters=list(scorer.parameters()), **settings,
    )  # fmt: skip
    return scorer, records


def test_loss_by_hand():
    """Scores 2 and 0.5, so softplus(-1.5) = 0.201413 where the first is preferred, 1.701413 where the second, and for a
    tie the mean, 0.951413, minus log 2: 0.258266. Label 0.9: 0.9 * 0.201413 + 0.1 * 1.701413 - 0.325083 = 0.026330."""
    found = preference_loss(tensor(2, 2, 2, 2), tensor(0.5, 0.5, 0.5, 0.5), tensor(1, 0, 0.5, 0.9))
    assert found.tolist() == pytest.approx([0.201413, 1.701413, 0.258266, 0.026330], abs=1e-6)
    with pytest.raises(ValueError, match="shapes must be equal"):
        preference_loss(tensor(1, 2), tensor(1, 2), tensor(1))


def test_loss_and_gradient_are_torchs_cross_entropy_of_the_softmax():
    scores = (3 * rng.normal((2, 7), 0, "scores", dtype=torch.float64)).requires_grad_()
    label = tensor(1, 0, 0.5, 1, 0.2, 0.7, 0)
    expected = F.cross_entropy(scores.T, torch.stack([label, 1 - label], 1), reduction="none")
    entropy = torch.distributions.Bernoulli(label).entropy()
    found = preference_loss(scores[0], scores[1], label)
    assert torch.allclose(found, expected - entropy, rtol=1e-9, atol=1e-9)
    (a,), (b,) = (torch.autograd.grad(loss.sum(), scores, retain_graph=True) for loss in (found, expected))
    assert torch.allclose(a, b, rtol=1e-9) and a.abs().min() > 1e-4


def test_every_label_has_least_loss_0_where_the_softmax_says_it():
    label = tensor(0.5, 0.2, 0.9)
    gap = torch.logit(label).requires_grad_()
    loss = preference_loss(gap, torch.zeros_like(gap), label)
    assert loss.abs().max() < 1e-12 and torch.autograd.grad(loss.sum(), gap)[0].abs().max() < 1e-12
    assert (preference_loss(gap.detach() + 0.1, torch.zeros(3).double(), label) > 0).all()
    far = preference_loss(tensor(1e4, -1e4), tensor(0, 0), tensor(1, 1))
    assert far.tolist() == [0, 1e4]


def test_a_pair_is_noised_alike_and_predicted_in_one_call_without_gradient():
    latents, text = MemoryPairs().batch([0, 4, 7])
    t, noise, calls = torch.tensor([0, 300, 999]), rng.normal((3, *SHAPE), 9, "noise"), []

    def predict(x, t, text):
        calls.append((x, t, text))
        assert not torch.is_grad_enabled()
        return x

    clean, times = predicted_pairs(predict, latents, text, t, noise, SCHEDULE)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[t].view(3, 1, 1, 1)
    expected = [abar.sqrt() * latents[:, side].double() + (1 - abar).sqrt() * noise.double() for side in (0, 1)]
    assert len(calls) == 1
    # Two rounded factors, two products and a sum in float32: at most 4 half ulps (2^-24) of terms that add up to 8.
    torch.testing.assert_close(clean.double(), torch.cat(expected), rtol=0, atol=2e-6)
    assert torch.cat([latents[:, 0], latents[:, 1], noise]).abs().max() < 4
    assert times.tolist() == [0, 300, 999] * 2 and torch.equal(calls[0][2], torch.cat([text, text]))


def test_every_prompt_weighs_the_same():
    weights = prompt_weights(PROMPTS)
    assert weights[:4].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 3, 1])
    per_prompt = Counter()
    for prompt, weight in zip(PROMPTS, weights.tolist(), strict=True):
        per_prompt[prompt] += weight
    assert all(total == pytest.approx(1) for total in per_prompt.values())


def by_hand(step, scorer, labels=None, batch=4):
    """The loss of a step as the paper has it: weights 1/#pairs that sum to 1 over the batch, one t and noise a pair."""
    rows = samples_at(batch * (step - 1), batch, 10, SEED)
    total, share = 0.0, sum(1 / PROMPTS.count(PROMPTS[index]) for _, index in rows)
    for address in rows:
        (latents,), (text,) = MemoryPairs().batch([address[1]])
        t = rng.integers_batch(0, 1000, SEED, "timestep", [address])
        alpha, sigma = SCHEDULE.alpha(t).float(), SCHEDULE.sigma(t).float()
        x = alpha * latents + sigma * rng.normal(SHAPE, SEED, "noise", *address)
        scores = scorer(torch.tanh(shrunk(x, t, text.expand(2, -1, -1))), None, t.repeat(2))
        label = 1.0 if labels is None else float(labels[address[1]])
        logs = F.log_softmax(scores, 0)
        loss = -(label * logs[0] + (1 - label) * logs[1]) - (math.log(2) if label == 0.5 else 0)
        total += float(loss.detach()) / PROMPTS.count(PROMPTS[address[1]]) / share
    return total


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_loss_does_not_depend_on_micro_batches(accumulation):
    labels = tensor(1, 0, 1, 0.5, 1, 1, 0, 1, 0.5, 1)
    untouched = Scorer()
    scorer, records = start(accumulation=accumulation, labels=labels, max_steps=3)
    records = list(records)
    assert records[0].loss == pytest.approx(by_hand(1, untouched, labels), abs=1e-5)
    assert records[0].loss != pytest.approx(records[1].loss, abs=1e-3)
    other, more = start(labels=labels, max_steps=3)
    assert [r.loss for r in records] == pytest.approx([r.loss for r in more], rel=1e-5)
    assert torch.allclose(scorer.weight, other.weight, rtol=1e-4) and not torch.equal(scorer.weight, untouched.weight)


def test_a_resumed_run_goes_on_exactly():
    scorer, records = start(max_steps=6)
    whole = list(records)
    half, records = start(max_steps=3)
    progress = list(records)[-1].progress
    weights = [weight.detach().clone() for weight in half.parameters()]
    again = Scorer()
    for new, old in zip(again.parameters(), weights, strict=True):
        new.data.copy_(old)
    rest = train_step_aware(
        MemoryPairs(), PROMPTS, again, shrunk, torch.tanh, schedule=SCHEDULE, parameters=list(again.parameters()),
        optimizer=torch.optim.SGD(again.parameters(), lr=0.01), lr_scheduler=None, accelerator=Accelerator(cpu=True),
        batch_size=4, seed=SEED, max_steps=6, progress=progress,
    )  # fmt: skip
    assert [r.loss for r in rest] == [r.loss for r in whole[3:]]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), scorer.parameters(), strict=True))


def test_training_learns_to_rank():
    """Winners are a little darker. Their noise is shared, so what is linear ranks alike at every noise level."""
    scorer, records = start(lr=0.5, max_steps=60, batch_size=10, decode=lambda x: x)

    def accuracy(model):
        pairs = PreferencePairs(MemoryPairs(), PROMPTS, shrunk, lambda x: x, SCHEDULE)
        return accuracy_by_noise(pairs, model, timesteps=[0, 500, 999], seed=1)

    at_start = accuracy(Scorer())
    records = list(records)
    assert set(at_start.values()) == {at_start[0]} and at_start[0] < 0.8
    assert accuracy(scorer) == {0: 1.0, 500: 1.0, 999: 1.0}
    assert records[-1].loss < records[0].loss and records[-1].metrics["accuracy"] == 1.0
    assert records[-1].metrics["margin"] > records[0].metrics["margin"]


def test_accuracy_by_hand():
    """Of five pairs: right, wrong, a tie in the score (half), labelled the other way and so right, a tied label."""
    cache = MemoryPairs(5)
    margins, rows = tensor(1, -1, 0, -2, 3), iter([[0, 1], [2, 3], [4]])

    def score(seen, prompts, t):
        gap = margins[next(rows)]
        assert prompts[: len(gap)] == prompts[len(gap) :] and t.tolist() == [251] * 2 * len(gap)
        return torch.cat([gap + 7, torch.full_like(gap, 7)])

    pairs = PreferencePairs(cache, PROMPTS[:5], shrunk, torch.tanh, SCHEDULE, tensor(1, 1, 1, 0, 0.5))
    found = accuracy_by_noise(pairs, score, timesteps=[251], seed=0, batch_size=2)
    assert found == {251: pytest.approx(2.5 / 4)}


def test_accuracy_is_measured_on_the_same_noise_in_any_batches():
    seen = []

    def record(size):
        def score(x, prompts, t):
            seen.append(x)
            return x.flatten(1).sum(1)

        pairs = PreferencePairs(MemoryPairs(), PROMPTS, lambda x, t, text: x, lambda x: x, SCHEDULE)
        accuracy_by_noise(pairs, score, timesteps=[500, 900], seed=0, batch_size=size)
        batches = [part.chunk(2) for part in seen]
        seen.clear()
        return [torch.cat([pair[side] for pair in batches]) for side in (0, 1)]

    for whole, cut in zip(record(10), record(3), strict=True):
        assert torch.equal(whole, cut)


def test_prompts_and_labels_must_be_one_a_pair():
    with pytest.raises(ValueError, match="10 pairs have 10 prompts and 3 labels"):
        next(start(labels=tensor(1, 1, 1))[1])
    with pytest.raises(ValueError, match="10 pairs have 1 prompts"):
        PreferencePairs(MemoryPairs(), ["a"], shrunk, torch.tanh, SCHEDULE)


@pytest.mark.parametrize("inputs", ["pictures", "latents"])
def test_the_command_trains_the_embedded_reward(tmp_path, capsys, inputs):
    """Pairs, cache, base, reward, loop, folder: a few steps, then the folder scores what the base predicts."""
    from diffusion_align.commands.train.train import train
    from diffusion_align.methods.step_aware import METHOD
    from diffusion_align.options.train.spm import TrainSpm, check_train_spm
    from diffusion_align.rewards.step_aware_load import latent_scorer, load_step_aware
    from diffusion_align.rewards.step_aware_model import start_step_aware

    options = TrainSpm(
        pretrained_model_name_or_path="tiny", dataset_name="tiny", max_train_samples=20, held_out=4, device="cpu",
        inputs=inputs, guidance=1.0, train_batch_size=4, max_train_steps=2, lr_warmup_steps=1, learning_rate=1e-4,
        output_dir=str(tmp_path / "spm"),
    )  # fmt: skip
    check_train_spm(options)
    assert train(METHOD, options) == 0
    report = json.loads((tmp_path / "spm" / "accuracy.json").read_text())
    assert report["steps"] == 2 and report["held_out"] == 4
    assert list(report["before"]) == list(report["after"]) == ["0", "251", "501", "701", "951"]
    said = capsys.readouterr().out
    assert "16 to train on, 4 held out" in said and "timestep" in said
    assert len((tmp_path / "spm" / "metrics.jsonl").read_text().splitlines()) == 2
    model = load_step_aware(tmp_path / "spm", device="cpu")
    shape = (4, 16, 16) if inputs == "latents" else None
    assert model.latents == shape
    base = start_step_aware("tiny", device="cpu", latents=shape).state_dict()
    moved = [name for name, weight in model.state_dict().items() if not torch.equal(weight, base[name])]
    assert {"clip.logit_scale", "clip.token_embedding.weight", "clip.visual.proj", "time.final.weight"} <= set(moved)
    score = latent_scorer(tmp_path / "spm", decode=lambda z: F.interpolate(z[:, :3], size=64), device="cpu")
    assert score(torch.zeros(2, 4, 16, 16), ["a red circle"] * 2, torch.tensor([5, 500])).shape == (2,)
    with pytest.raises(ValueError, match="holds a run already"):
        train(METHOD, options)


def test_an_interrupted_command_is_resumed_with_every_bit(tmp_path, monkeypatch):
    """A signal in the third of six steps: a checkpoint, and with it the model that an undisturbed run gives."""
    from accelerate.state import AcceleratorState

    from diffusion_align import cli
    from diffusion_align.commands.train.session import Session
    from diffusion_align.methods import step_aware
    from diffusion_align.rewards.step_aware_load import load_step_aware

    argv = ["reward", "train-spm", "--model", "tiny", "--dataset_name", "tiny", "--max_train_samples", "8"]
    argv += ["--held_out", "2", "--device", "cpu", "--train_batch_size", "2", "--max_train_steps", "6", "--guidance"]
    argv += ["1", "--learning_rate", "1e-4", "--cache_dir", str(tmp_path / "cache"), "--output_dir"]
    assert cli.main([*argv, str(tmp_path / "whole")]) == 0
    AcceleratorState._reset_state(True)
    real = step_aware.preference_method

    def interrupted(pairs, scorer, run):
        method, steps = real(pairs, scorer, run), []

        def summarise(columns):
            steps.append(0)
            if len(steps) == 3:
                run.stop_requested.__self__.interrupt.signal_number = 2
            return method.summarise(columns)

        return replace(method, summarise=summarise)

    monkeypatch.setattr(step_aware, "preference_method", interrupted)
    assert cli.main([*argv, str(tmp_path / "cut")]) == 128 + 2
    assert Session.stop_requested and not (tmp_path / "cut" / "step_aware.safetensors").exists()
    monkeypatch.setattr(step_aware, "preference_method", real)
    AcceleratorState._reset_state(True)
    assert cli.main([*argv, str(tmp_path / "cut"), "--resume_from_checkpoint", "latest"]) == 0
    whole, cut = (load_step_aware(tmp_path / name, device="cpu").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    for file in ("accuracy.json", "metrics.jsonl"):
        assert (tmp_path / "whole" / file).read_text() == (tmp_path / "cut" / file).read_text()


def test_whole_prompts_are_held_out():
    from diffusion_align.methods.step_aware import accuracy_table, hold_out

    pairs = [Pair(str(i), prompt, b"", b"") for i, prompt in enumerate(PROMPTS)]
    training, held = hold_out(pairs, 3, seed=0)
    assert len(held) >= 3 and sorted(map(int, (p.id for p in training + held))) == list(range(10))
    assert not {p.prompt for p in training} & {p.prompt for p in held}
    assert [p.id for p in held] == sorted((p.id for p in held), key=int) and hold_out(pairs, 3, seed=0)[1] == held
    assert any(hold_out(pairs, 3, seed=seed)[1] != held for seed in range(1, 5))
    assert hold_out(pairs, 0, seed=0) == (pairs, [])
    with pytest.raises(ValueError, match="leaves none"):
        hold_out(pairs, 10, seed=0)
    assert accuracy_table({0: 0.5}, {0: 0.75})[1].split() == ["0", "0.500", "0.750", "+0.250"]
    assert accuracy_table({}, {}) == []


def test_options_that_cannot_be_meant_are_refused():
    from diffusion_align.options import UsageError
    from diffusion_align.options.train.spm import TrainSpm, check_train_spm

    good = {"pretrained_model_name_or_path": "tiny", "dataset_name": "tiny"}
    check_train_spm(TrainSpm(**good))
    for bad, message in (
        ({"dataset_name": None}, "which pairs"),
        ({"pretrained_model_name_or_path": None}, "which model"),
        ({"train_data_dir": "x"}, "two sources"),
        ({"max_train_samples": 100, "held_out": 100}, "leaves none"),
        ({"mixed_precision": "fp16", "device": "cpu"}, "needs a GPU"),
    ):
        with pytest.raises(UsageError, match=message):
            check_train_spm(TrainSpm(**(good | bad)))


def test_labels_by_a_reward_by_hand():
    """tanh(d / 2) is p_0 - p_1: d = 0.2 gives 0.0997, within 0.1; d = 0.21 gives 0.1046, beyond."""
    from diffusion_align.methods.shared.relabel import describe_labels, labels_of_scores, own_labels

    scores = torch.tensor([[20.2, 20.0], [20.21, 20.0], [20.0, 20.21], [18.0, 22.0], [20.0, 20.2], [5.0, 5.0]]).double()
    found = labels_of_scores(scores, 0.1)
    assert found.tolist() == [0.5, 1, 0, 0, 0.5, 0.5]
    assert labels_of_scores(scores, 0.0).tolist() == [1, 1, 0, 0, 0, 0.5]
    assert (scores.softmax(1) @ torch.tensor([1.0, -1.0]).double())[:2].tolist() == pytest.approx(
        [0.0997, 0.1046], abs=1e-4
    )
    own = torch.tensor([1, 1, 1, 0.5, 1, 0.5]).double()
    said = describe_labels("pickscore", own, found, 0.1)
    assert "6 pairs: 1 as the data has them, 1 flipped, 1 ties of the data decided, 3 ties" in said
    pairs = [Pair("0", "a", b"", b""), Pair("1", "a", b"", b"", tie=True)]
    assert own_labels(pairs).tolist() == [1, 0.5]
    with pytest.raises(ValueError, match="no finite score for 1 of 1 pairs"):
        labels_of_scores(torch.tensor([[math.nan, 1.0]]), 0.1)


def test_pairs_are_scored_once_at_their_own_size_and_kept(tmp_path):
    from diffusion_align.data.images import encode_png
    from diffusion_align.methods.shared.relabel import scores_of_pairs
    from diffusion_align.rewards import read_spec

    def flat(level, height=8, width=8):
        return encode_png(torch.full((3, height, width), level / 255))

    pairs = [Pair(str(i), f"prompt {i % 3}", flat(i), flat(100 + i, 8, 8 + i % 2)) for i in range(20)]
    seen = []

    def reward(images, prompts):
        seen.append((tuple(images.shape), list(prompts)))
        return images.amax((1, 2, 3)) * 255  # of one level: its mean, but the same in a batch of any shape

    expected = [[float(i), 100.0 + i] for i in range(20)]
    found = scores_of_pairs(read_spec("tiny"), pairs, tmp_path, lambda: reward)
    assert torch.allclose(found, torch.tensor(expected).double(), atol=1e-4)
    assert {shape[2:] for shape, _ in seen} == {(8, 8), (8, 9)}
    assert sum(shape[0] for shape, _ in seen) == 40

    def never():
        raise AssertionError("scored again")

    assert torch.equal(scores_of_pairs(read_spec("tiny"), pairs, tmp_path, never), found)
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:17]) + lines[17][:3])  # killed in the middle of a line
    seen.clear()
    assert torch.equal(scores_of_pairs(read_spec("tiny"), pairs, tmp_path, lambda: reward), found)
    assert sum(shape[0] for shape, _ in seen) == 6
    with pytest.raises(AssertionError, match="scored again"):
        scores_of_pairs(read_spec("clipscore"), pairs, tmp_path, never)
    with pytest.raises(ValueError, match="pair x: picture 1 is empty"):
        scores_of_pairs(read_spec("tiny"), [Pair("x", "a", flat(1), b"")], tmp_path, lambda: reward)


def test_the_command_relabels_and_keeps_ties(tmp_path, capsys, monkeypatch):
    """The labels that the loop gets are those of the scores, in the order of the pairs that were kept."""
    from diffusion_align import cli
    from diffusion_align.data import read_pairs, write_pairs_parquet
    from diffusion_align.data.images import encode_png
    from diffusion_align.methods import step_aware

    # The reward is how bright a picture is, in steps of 0.51: the first of two wins, loses, or is even.
    light, dark, data = encode_png(torch.full((3, 64, 64), 0.6)), encode_png(torch.full((3, 64, 64), 0.2)), []
    for label in (1.0, 0.0, 0.5):
        data += [(light, dark, label), (dark, light, label), (light, light, label)]
    zero, one, label_0 = zip(*data, strict=True)
    write_pairs_parquet(tmp_path / "train.parquet", [f"prompt {i}" for i in range(9)], zero, one, label_0)
    (tmp_path / "bright.py").write_text("def score(images, prompts):\n    return 5 * images.mean((1, 2, 3))\n")
    assert len(read_pairs(tmp_path / "train.parquet")[0]) == 6
    pairs, counts = read_pairs(tmp_path / "train.parquet", keep_ties=True)
    assert [pair.tie for pair in pairs] == [False] * 6 + [True] * 3 and counts.ties == 0 and counts.used == 9

    given = {}

    def method(pairs, scorer, run):
        given["labels"] = pairs.wanted

    monkeypatch.setattr(step_aware, "preference_method", method)
    monkeypatch.setattr(step_aware, "run_steps", lambda *_, **__: iter(()))
    base = ["reward", "train-spm", "--model", "tiny", "--train_data_dir", str(tmp_path / "train.parquet"), "--device"]
    base += ["cpu", "--held_out", "0", "--max_train_steps", "1", "--guidance", "1"]
    reward = ["--relabel", f"python:{tmp_path / 'bright.py'}:score"]
    assert cli.main([*base, "--output_dir", str(tmp_path / "a"), *reward, "--keep_ties"]) == 0
    # Winner first: label 1 is light dark -> 1, dark light -> 0, even; label 0 turns them over; ties keep the order.
    assert given["labels"].tolist() == [1, 0, 0.5, 0, 1, 0.5, 1, 0, 0.5]
    assert "9 pairs: 2 as the data has them, 2 flipped, 2 ties of the data decided, 3 ties" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "accuracy.json").read_text())["labels"].startswith("python:")
    assert cli.main([*base, "--output_dir", str(tmp_path / "b")]) == 0
    assert given["labels"].tolist() == [1] * 6


def test_a_relabelling_that_cannot_be_meant_is_refused(tmp_path, capsys):
    from diffusion_align.options import UsageError, resolve
    from diffusion_align.options.train.spm import TrainSpm, check_train_spm, notes_train_spm

    good = {"pretrained_model_name_or_path": "tiny", "dataset_name": "tiny"}
    for bad, message in (("pikscore", "did you mean pickscore"), ("people", "cannot relabel"), ("std:tiny", "std:")):
        with pytest.raises(UsageError, match=message):
            check_train_spm(TrainSpm(**good, relabel=bad))
    assert notes_train_spm(TrainSpm(tie_margin=0.2), {"tie_margin"}) and not notes_train_spm(TrainSpm(), ())
    (tmp_path / "c.yaml").write_text("labels:\n  relabel: python:x.py:f\n")
    with pytest.raises(UsageError, match="names a program to run"):
        resolve(TrainSpm, "reward train-spm", config=str(tmp_path / "c.yaml"))
