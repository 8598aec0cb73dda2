"""Checkpoints of earlier versions load, and the run they are of goes on.

tests/fixtures/checkpoint-v1 was written once, by `write_fixture` under FORMAT 1, and is never written again: a version
that cannot read it breaks what was promised. A new FORMAT gets a folder of its own beside it.
"""

import itertools
from pathlib import Path

import pytest
import torch
from helpers_train import make_run

from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.checkpoints.state import pack, restore
from diffusion_align.train.run import Progress

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
IDENTITY = {"seed": 3, "rank": 4, "betas": [0.9, 0.999]}
STEP = 5


def the_run():
    return make_run("lora", ema=True, accumulation=2, caption_dropout=0.3)


def write_fixture(folder):
    """Step 5 of the toy's run: adapter, AdamW, learning-rate schedule, average, position and identity."""
    run = the_run()
    step = next(itertools.islice(run.steps(), STEP - 1, None))
    tensors, state = pack(run.parameters, run.optimizer, run.lr_scheduler, step.progress, run.ema)
    return checkpoint.save(folder, STEP, tensors, state | {"identity": IDENTITY})


def close(left, right):
    return left.keys() == right.keys() and all(
        left[group].keys() == right[group].keys()
        and all(torch.allclose(left[group][name], value, rtol=1e-4, atol=1e-6) for name, value in right[group].items())
        for group in right
    )


@pytest.mark.parametrize("version", ["v1"])
def test_checkpoints_of_earlier_versions_resume(version, tmp_path):
    """Beside the same run without a stop, today: the numbers are close, for another machine adds in another order."""
    loaded = checkpoint.latest_good(FIXTURES / f"checkpoint-{version}")
    assert loaded is not None and loaded.step == STEP and loaded.state["identity"] == IDENTITY
    today = checkpoint.load(write_fixture(tmp_path))
    assert close({group: loaded.tensors[group] for group in today.tensors}, today.tensors)
    run, whole = the_run(), [step.row() for step in the_run().steps()]
    progress = restore(loaded, run.parameters, run.optimizer, run.lr_scheduler, run.ema)
    assert progress == Progress(step=STEP, samples=4 * STEP) and run.ema.updates == STEP
    rows = [step.row() for step in run.steps(progress)]
    assert [row["step"] for row in rows] == list(range(STEP + 1, 13))
    for row, expected in zip(rows, whole[STEP:], strict=True):
        # AdamW divides by the size of a gradient, so seven float32 steps lose about three of seven digits.
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_stored_checkpoints_are_small_and_all_are_tried():
    stored = sorted(path.name for path in FIXTURES.glob("checkpoint-*"))
    assert stored == ["checkpoint-v1"]
    assert sum(file.stat().st_size for file in FIXTURES.rglob("*") if file.is_file()) < 40_000
