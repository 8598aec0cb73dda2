"""A run that was stopped and taken up again is the run that was never stopped, bit for bit."""

import itertools

import pytest
import torch
from helpers_train import MemoryPairs, make_run

from diffusion_align.train import record
from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.checkpoints.state import pack, restore
from diffusion_align.train.checkpoints.store import Checkpoint, CheckpointError
from diffusion_align.train.run import Progress

# 12 steps of 4 over 10 pairs: epochs end inside steps 3, 8, ... and with 8 pairs exactly on every second step.
SETUPS = list(itertools.product(["lora", "full"], [1, 4], [False, True], [10, 8]))


def packed(run, progress):
    return pack(run.parameters, run.optimizer, run.lr_scheduler, progress, run.ema)


def advance(records, count):
    """The record after `count` steps."""
    return list(itertools.islice(records, count))[-1]


def build(mode, accumulation, ema, count):
    return make_run(mode, ema=ema, accumulation=accumulation, cache=MemoryPairs(count), caption_dropout=0.3)


def whole_run(setup):
    """Metrics rows and the packed state after every step of an uninterrupted run."""
    run = build(*setup)
    rows, states = [], []
    for step in run.steps():
        rows.append(step.row())
        tensors, state = packed(run, step.progress)
        states.append(({g: {n: v.clone() for n, v in group.items()} for g, group in tensors.items()}, state))
    return rows, states


def same(left, right):
    """Equal groups, names, types and bits of two dicts of dicts of tensors."""
    return left.keys() == right.keys() and all(
        left[group].keys() == right[group].keys()
        and all(
            left[group][name].dtype == value.dtype and torch.equal(left[group][name], value)
            for name, value in right[group].items()
        )
        for group in right
    )


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: "-".join(map(str, setup)))
def test_stopping_anywhere_changes_nothing(setup, tmp_path):
    rows, states = whole_run(setup)
    for stop in range(1, 12):
        first = build(*setup)
        step = advance(first.steps(), stop)
        folder = tmp_path / str(stop)
        checkpoint.save(folder, stop, *packed(first, step.progress))
        resumed = build(*setup)
        loaded = checkpoint.latest_good(folder)
        assert loaded is not None and loaded.step == stop
        progress = restore(loaded, resumed.parameters, resumed.optimizer, resumed.lr_scheduler, resumed.ema)
        assert progress == step.progress and same(packed(resumed, progress)[0], states[stop - 1][0])
        for later in resumed.steps(progress):
            assert later.row() == rows[later.step - 1]
            tensors, state = packed(resumed, later.progress)
            assert state == states[later.step - 1][1] and same(tensors, states[later.step - 1][0])
        assert later.step == 12


def test_several_stops_in_one_epoch(tmp_path):
    """Stopping every 2 steps of an epoch of 25."""
    setup = ("lora", 4, True, 100)
    _, states = whole_run(setup)
    progress = Progress()
    for stop in range(2, 14, 2):
        run = build(*setup)
        if stop > 2:
            loaded = checkpoint.latest_good(tmp_path)
            progress = restore(loaded, run.parameters, run.optimizer, run.lr_scheduler, run.ema)
        step = advance(run.steps(progress), 2)
        checkpoint.save(tmp_path, step.step, *packed(run, step.progress))
    assert same(checkpoint.latest_good(tmp_path).tensors, states[11][0])


def test_skipped_steps_survive_a_stop(tmp_path):
    """Five in a row stop the run also when the stop fell between them."""
    run = make_run()
    nan = lambda x, t, text: run.network(x, t, text) * torch.nan  # noqa: E731
    step = advance(run.steps(predict_policy=nan), 3)
    checkpoint.save(tmp_path, 3, *packed(run, step.progress))
    run = make_run()
    progress = restore(checkpoint.latest_good(tmp_path), run.parameters, run.optimizer, run.lr_scheduler)
    assert progress == Progress(step=3, samples=12, skipped=3, skipped_in_row=3)
    with pytest.raises(RuntimeError, match="steps 1 to 5"):
        list(run.steps(progress, predict_policy=nan))


def test_what_spikes_are_told_from_survives_a_stop(tmp_path):
    run = make_run()
    step = advance(run.steps(spike=9.0), 5)
    checkpoint.save(tmp_path, 5, *packed(run, step.progress))
    again = make_run()
    progress = restore(checkpoint.latest_good(tmp_path), again.parameters, again.optimizer, again.lr_scheduler)
    assert progress == step.progress and len(progress.norms) == 5


def test_metrics_of_a_resumed_run_are_one_unbroken_file(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    for step in make_run().steps():
        record.append(whole, step.row())
    run = make_run()
    for step in itertools.islice(run.steps(), 7):
        record.append(cut, step.row())
        if step.step == 5:
            saved = checkpoint.save(tmp_path, 5, *packed(run, step.progress))
    with cut.open("ab") as file:
        file.write(b'{"step": 8, "lo')  # killed while writing
    run = make_run()
    loaded = checkpoint.load(saved)
    record.truncate(cut, loaded.step)
    for step in run.steps(restore(loaded, run.parameters, run.optimizer, run.lr_scheduler)):
        record.append(cut, step.row())
    assert cut.read_bytes() == whole.read_bytes() and len(record.read(cut)) == 12


def a_checkpoint(tmp_path, **options):
    run = make_run(**options)
    step = next(run.steps())
    return checkpoint.load(checkpoint.save(tmp_path, 1, *packed(run, step.progress)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.tensors["model"].pop("up"), "model.safetensors: 'up' is absent"),
        (lambda c: c.tensors["model"].update(other=torch.zeros(1)), "'other' is torch.float32 .1., in this run absent"),
        (lambda c: c.tensors["model"].update(up=torch.zeros(32, 8)), r"'up' is torch.float32 \[32, 8\], in this run"),
        (lambda c: c.tensors["model"].update(up=torch.zeros(32, 4).half()), "'up' is torch.float16"),
        (lambda c: c.tensors["model"]["up"].fill_(torch.nan), "'up' has values that are not finite"),
        (lambda c: c.state.update(ema={"decay": 0.9, "updates": 1}), "was saved with ema, unlike this run"),
        (lambda c: c.state.pop("lr_scheduler"), "was saved without lr_scheduler"),
        (lambda c: c.state["optimizer"].update({"class": "Adafactor"}), "saved by Adafactor"),
        (lambda c: c.state["optimizer"]["names"].reverse(), "in another order"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, change, reason):
    loaded = a_checkpoint(tmp_path)
    change(loaded)
    run = make_run()
    before = run.weights()
    with pytest.raises(CheckpointError, match=reason):
        restore(loaded, run.parameters, run.optimizer, run.lr_scheduler)
    assert all(torch.equal(before[name], weight) for name, weight in run.weights().items())


def test_the_average_comes_back_with_its_counter(tmp_path):
    loaded: Checkpoint = a_checkpoint(tmp_path, ema=True, warmup=0)
    run = make_run(ema=True, warmup=0)
    restore(loaded, run.parameters, run.optimizer, run.lr_scheduler, run.ema)
    assert run.ema.updates == 1
    with pytest.raises(CheckpointError, match="ema decay was 0.9 and is now 0.5"):
        run.ema.decay = 0.5
        restore(loaded, run.parameters, run.optimizer, run.lr_scheduler, run.ema)
    with pytest.raises(CheckpointError, match="with ema, unlike"):
        restore(loaded, run.parameters, run.optimizer, run.lr_scheduler)
