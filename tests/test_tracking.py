"""Trackers: a curve for those who watch, and nothing that can stop a run."""

import logging
import types

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from diffusion_align.commands.tracking import start_trackers, tracker_names
from diffusion_align.options import UsageError


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
