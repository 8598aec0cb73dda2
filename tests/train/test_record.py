"""metrics.jsonl: whole rows only, cut back to a step exactly."""

import json
import math

import pytest

from diffusion_align.train import record


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        record.append(path, {"step": step, "loss": 1 / step})
    return path


def test_rows_come_back_exactly(file):
    assert record.read(file) == [{"step": step, "loss": 1 / step} for step in range(1, 6)]


def test_numbers_that_are_not_finite_are_null(file):
    record.append(file, {"step": 6, "loss": math.nan, "norm": math.inf, "lr": 0.0})
    assert record.read(file)[-1] == {"step": 6, "loss": None, "norm": None, "lr": 0.0}
    json.loads(file.read_text().splitlines()[-1], parse_constant=pytest.fail)


@pytest.mark.parametrize("step", [0, 1, 3, 5, 9])
def test_rows_after_a_step_are_dropped(file, step):
    lines = file.read_bytes().splitlines(keepends=True)
    record.truncate(file, step)
    assert file.read_bytes() == b"".join(lines[:step])


def test_a_torn_last_line_is_left_out_and_cut(file):
    whole = file.read_bytes()
    for length in range(1, 20):
        file.write_bytes(whole + b'{"step": 6, "loss": 0.5}\n'[:length])
        assert len(record.read(file)) == 5
    record.truncate(file, 6)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("line", [b"rubbish\n", b'{"loss": 1}\n', b"[1]\n", b'{"step": "1"}\n', b"\n", b"\xff\n"])
def test_any_other_bad_line_is_named(file, line):
    data = file.read_bytes()
    file.write_bytes(data + line + data)
    with pytest.raises(ValueError, match="metrics.jsonl: line 6 is not a row with a step"):
        record.read(file)


def test_truncating_nothing_is_fine(tmp_path):
    record.truncate(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()
