"""A long run holds no more than a short one; tests/stress/long.py measures a thousand steps."""

from dataclasses import replace

import pytest
from accelerate.state import AcceleratorState
from helpers_tiny import make_tiny_folder
from stress import long
from stress.long import Growth, Mark, arguments, four, growth, marks

from diffusion_align.train import record

STEPS = 60


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights, pictures of 64 pixels as the prompts' judge and the pairs have them."""
    return str(make_tiny_folder(tmp_path_factory.mktemp("long") / "model"))


@pytest.mark.parametrize("method", long.METHODS)
def test_sixty_steps_hold_no_more_than_six(method, model, tmp_path, capfd):
    """Processor time is not checked, because over six steps it means nothing."""
    command = arguments(method, STEPS, model, tmp_path)
    found = growth(marks(command, four(STEPS)))
    print(found)
    assert replace(found, seconds=1.0).is_bounded()
    assert len(record.read(tmp_path / "run" / "metrics.jsonl")) == STEPS
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def test_growth_of_any_kind_is_noticed():
    """Metrics that each step reads again, a list that keeps each row, a file that stays open, a thread."""
    even = [Mark(step, 10**9, 10, 3, 10**5, 0.1 * step, 1000 * step) for step in four(1000)]
    assert growth(even) == Growth(1.0, 0, 0, 0, pytest.approx(1.0), 1.0) and growth(even).is_bounded()
    reads_all = [replace(mark, moved=10 * mark.step**2) for mark in even]
    assert growth(reads_all).moved == pytest.approx(1900 / 300)
    for worse in (
        reads_all,
        [replace(mark, seconds=0.1 * mark.step + 1e-4 * mark.step**2) for mark in even],
        *(
            [*even[:-1], replace(even[-1], **more)]
            for more in ({"memory": 10**9 + 11 * 10**6}, {"files": 11}, {"threads": 4}, {"objects": 10**5 + 900})
        ),
    ):
        assert not growth(worse).is_bounded()
