"""metrics.jsonl: whole rows only, cut back to a step exactly."""

import json
import logging
import math
import resource
import signal
from pathlib import Path

import pytest
from stress.checkpoint.kills import ended, in_child

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
    row = b'{"step": 6, "loss": 0.5}\n'
    for length in range(len(row)):
        file.write_bytes(whole + row[:length])
        assert len(record.read(file)) == 5
        record.truncate(file, 6)
        assert file.read_bytes() == whole
    file.write_bytes(whole + row)
    record.truncate(file, 6)
    assert record.read(file)[-1] == {"step": 6, "loss": 0.5}


@pytest.mark.parametrize("line", [b"rubbish\n", b'{"loss": 1}\n', b"[1]\n", b'{"step": "1"}\n', b"\n", b"\xff\n"])
def test_any_other_bad_line_is_named(file, line):
    data = file.read_bytes()
    file.write_bytes(data + line + data)
    with pytest.raises(ValueError, match="metrics.jsonl: line 6 is not a row with a step"):
        record.read(file)


def test_truncating_nothing_is_fine(tmp_path):
    record.truncate(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture
def in_a_child():
    """Run work in a child, where a limit on the size of files harms nobody else; it stands in for a full disk."""

    def run(work):
        def limited():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            work()

        assert ended(in_child(limited)) == 0

    return run


def test_rows_without_disk_space_are_left_out_completely(file, in_a_child):
    """At every byte of a row where the room may end."""
    whole, row = file.read_bytes(), {"step": 6, "loss": 0.25}
    length = len(json.dumps(row)) + 1

    def work():
        for room in range(length):
            limit_files(len(whole) + room)
            with pytest.raises(OSError, match="File too large"):
                record.append(file, row)
            assert file.read_bytes() == whole
        limit_files(len(whole) + length)
        record.append(file, row)

    in_a_child(work)
    assert record.read(file)[5:] == [row]


def test_a_loop_continues_without_rows_and_warns_twice(file, in_a_child, tmp_path):
    """When the room ends, and how many rows are missing when there is room again."""

    def work():
        said = []
        record.logger.addHandler(logging.Handler())
        record.logger.handlers[-1].emit = lambda entry: said.append(entry.getMessage())
        add = record.recorder(file)
        add({"step": 6})
        limit_files(file.stat().st_size)
        for step in (7, 8, 9):
            add({"step": step})
        limit_files(resource.RLIM_INFINITY)
        for step in (10, 11):
            add({"step": step})
        (tmp_path / "said").write_text("\n".join(said))

    in_a_child(work)
    began, ended_line = (tmp_path / "said").read_text().splitlines()
    assert began.endswith("step 7 could not be written ([Errno 27] File too large); the training continues")
    assert ended_line.endswith("it can be written again; 3 rows up to step 9 are missing")
    assert [row["step"] for row in record.read(file)] == [1, 2, 3, 4, 5, 6, 10, 11]


def test_adding_a_row_costs_the_same_however_long_the_file_is(tmp_path):
    """In bytes read and written, which are what a function that looks at the whole file would show."""

    def cost(rows):
        path = tmp_path / str(rows)
        path.write_bytes(b'{"step": 1, "loss": 0.5}\n' * rows)
        add, before = record.recorder(path), moved()
        add({"step": 2, "loss": 0.5})
        return moved() - before

    def moved():
        lines = Path("/proc/self/io").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in ("rchar", "wchar"))

    if not Path("/proc/self/io").exists():
        pytest.skip("this system does not count what a process reads")
    assert cost(20_000) < cost(1) + 100
