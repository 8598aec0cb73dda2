"""Trackers: a curve for those who watch, and nothing that can stop a run."""

import logging
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from helpers_tiny import make_tiny_folder

from diffusion_align import cli
from diffusion_align.commands.train.tracking import finish_trackers, start_trackers, tracker_names
from diffusion_align.data import write_pairs_parquet
from diffusion_align.data.images import encode_png
from diffusion_align.options import UsageError
from diffusion_align.train import record


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)


def test_names():
    assert tracker_names(None) == tracker_names("none") == tracker_names("") == []
    assert tracker_names("tensorboard") == ["tensorboard"] and "tensorboard" in tracker_names("all")
    with pytest.raises(UsageError, match="did you mean tensorboard"):
        tracker_names("tensorbord")


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(UsageError, match="pip install wandb, or leave the option out"):
        tracker_names("wandb")


def test_tensorboard_gets_every_row(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, project_dir=str(tmp_path / "run" / "logs"))
    report = start_trackers(accelerator, ["tensorboard"], "mine", tmp_path / "run", {"lr": 1e-3, "prompts": ("a", "b")})
    for step in (1, 2):
        report({"step": step, "loss": 0.5 / step})
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "mine"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_a_tracker_that_fails_is_left_out_and_told_once(tmp_path, caplog):
    def fails(row, step):
        raise ConnectionError("gone\naway")

    calls = []
    broken = types.SimpleNamespace(name="broken", log=fails)
    whole = types.SimpleNamespace(name="whole", log=lambda row, step: calls.append(step))
    accelerator = Accelerator(cpu=True)
    accelerator.init_trackers = lambda *a, **k: setattr(accelerator, "trackers", [broken, whole])
    report = start_trackers(accelerator, ["both"], "mine", tmp_path, {})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            report({"step": step, "loss": 1.0})
    assert calls == [1, 2, 3] and [r.getMessage() for r in caplog.records] == [
        "tracker broken failed and is left out: gone away"
    ]


def test_a_tracker_that_cannot_start_is_left_out(tmp_path, caplog):
    accelerator = Accelerator(cpu=True)

    def refuse(*args, **kwargs):
        raise RuntimeError("no key")

    accelerator.init_trackers = refuse
    with caplog.at_level(logging.WARNING):
        report = start_trackers(accelerator, ["wandb"], "mine", tmp_path, {})
    report({"step": 1, "loss": 1.0})
    assert "tracker wandb could not start and is left out: no key" in caplog.text


def test_two_trackers_are_started_once_each_and_get_every_row_once(tmp_path, monkeypatch):
    calls = []

    def kind(name):
        made = {"log": lambda self, row, step: calls.append((name, step)), "start": lambda self: calls.append(name)}
        return type(name, (Fake,), {"name": name} | made)

    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, kind(name))
    accelerator = Accelerator(cpu=True)
    report = start_trackers(accelerator, ["tensorboard", "wandb"], "mine", tmp_path, {})
    for step in (1, 2):
        report({"step": step, "loss": 1.0})
    steps = [(name, step) for step in (1, 2) for name in ("tensorboard", "wandb")]
    assert calls == ["tensorboard", "wandb", *steps]


class Fake(GeneralTracker):
    """In the place of tensorboard's tracker; `fails` says where, and what is raised there."""

    name = "tensorboard"
    requires_logging_directory = False
    fails, error, rows = "never", ConnectionError("gone\naway"), 0

    def __init__(self, *args, **kwargs):
        super().__init__(_blank=True)
        self._may_fail("init")

    def _may_fail(self, where):
        if self.fails == where:
            raise self.error

    def start(self):
        self._may_fail("start")

    @property
    def tracker(self):
        return None

    def store_init_configuration(self, values):
        self._may_fail("config")

    def log(self, values, step=None, **kwargs):
        type(self).rows += 1
        self._may_fail(f"row {type(self).rows}")

    def finish(self):
        self._may_fail("finish")


class Odd(Exception):
    """As libraries define their own."""


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    make_tiny_folder(folder / "model")
    source = torch.Generator().manual_seed(0)
    pictures = [[encode_png(torch.rand(3, 32, 32, generator=source)) for _ in range(4)] for _ in range(2)]
    write_pairs_parquet(folder / "pairs.parquet", ["a circle", "a square", "red", "blue"], *pictures, [1.0] * 4)
    return folder


@pytest.mark.parametrize(
    "fails, error, rows",
    [
        ("init", OSError("no room"), 0),
        ("start", Odd(), 0),
        ("config", ConnectionError("no way\nthere"), 0),
        ("row 3", ConnectionError("gone\naway"), 3),
        ("row 3", Odd("strange"), 3),
        ("finish", OSError("late"), 5),
    ],
)
def test_a_run_ends_well_whatever_its_tracker_does(toys, tmp_path, monkeypatch, caplog, fails, error, rows):
    fake = type("Fake", (Fake,), {"fails": fails, "error": error})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", fake)
    argv = f"""train dpo --pretrained_model_name_or_path {toys / "model"} --train_data_dir {toys / "pairs.parquet"}
        --output_dir {tmp_path / "run"} --cache_dir {toys / "cache"} --max_train_steps 5 --report_to tensorboard
        --resolution 32 --validation_sampling_steps 1 --validation_prompt circle --device cpu""".split()
    with caplog.at_level(logging.WARNING, "diffusion_align.commands.train.tracking"):
        assert cli.main(argv) == 0
    assert fake.rows == rows and len(record.read(tmp_path / "run" / "metrics.jsonl")) == 5
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
    said = [r.getMessage() for r in caplog.records if r.name == "diffusion_align.commands.train.tracking"]
    assert len(said) == 1 and said[0].startswith("tracker tensorboard ") and "\n" not in said[0]
    assert (" ".join(str(error).split()) or "Odd") in said[0]


def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path):
    """A run is killed after step 5, with a checkpoint of step 3: of steps 4 and 5 only the second time counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run" / "logs"
    for start, end in ((0, 5), (3, 6)):
        accelerator = Accelerator(cpu=True, project_dir=str(folder))
        report = start_trackers(accelerator, ["tensorboard"], "mine", tmp_path / "run", {}, start)
        for step in range(start + 1, end + 1):
            report({"step": step, "loss": step + 10.0 * start})
        accelerator.end_training()
        AcceleratorState._reset_state(True)
    events = EventAccumulator(str(folder / "mine"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36)]


def test_trackers_end_without_the_group_of_processes_which_still_has_weights_to_write():
    """accelerate's own `end_training` destroys the group, and the processes then could not wait for the weights."""
    ended = []
    tracker = types.SimpleNamespace(finish=lambda: ended.append("tracker"))
    accelerator = types.SimpleNamespace(trackers=[tracker, tracker], end_training=lambda: ended.append("group"))
    finish_trackers(accelerator)
    assert ended == ["tracker", "tracker"]
