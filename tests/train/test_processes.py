"""Jobs of several processes when one fails: who is named, what is saved; tests/stress/processes.py has full counts."""

import os
import random
import re
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from helpers_machine import HANG
from helpers_train import make_run
from stress import equal, processes
from stress.jobs import Fault, Tally, command, launch
from stress.runs import flags, make_world

from diffusion_align.train.processes import notes, watch
from diffusion_align.train.processes.notes import Note, describe_fault, read_notes
from diffusion_align.train.processes.watch import ProcessFailed, ProcessLost


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def alone(tmp_path):
    """The watch of process 0 of 3; 1 and 2 have notes, but no process holds their locks."""
    watch.start(tmp_path, 0, 3)
    yield tmp_path
    watch.stop()


@pytest.mark.parametrize(
    ("others", "said"),
    [
        # First a failed process, then one that is gone, then a stalled one; a waiting process is never the cause.
        ([Note(1, 4, "s", 69, error="no"), Note(2, 4, "s", 90, gone=True)], "rank 1 at step 4 (s) failed: no"),
        (
            [Note(1, 4, "s", 60), Note(2, 5, "saving", 69, gone=True)],
            "rank 2 at step 5 (saving) is gone, perhaps killed; last note 31 s ago",
        ),
        (
            [Note(1, 4, "scoring", 69), Note(2, 4, "s", 60, waiting=True)],
            "rank 1 has not moved since step 4 (scoring), 31 s ago",
        ),
        ([Note(1, 4, "s", 99), Note(2, 3, "s", 69)], "rank 2 has not moved since step 3 (s), 31 s ago"),
        (
            [Note(1, 4, "s", 60, error="left", lost=True, gone=True), Note(2, 4, "s", 69)],
            "rank 2 has not moved since step 4 (s), 31 s ago",
        ),
        (
            [Note(1, 4, "s", 69, waiting=True), Note(2, 5, "s", 70, waiting=True)],
            "rank 1 has not moved since step 4 (s, waiting as all do), 31 s ago",
        ),
        (
            [Note(1, 4, "s", 60, error="left", lost=True)],
            "no other process is known to be at fault; check their output and the network",
        ),
    ],
)
def test_the_process_at_fault_is_named_with_step_and_time(others, said):
    assert describe_fault(others, now=100) == said


def test_the_lock_of_a_note_tells_that_its_process_is_gone(tmp_path):
    told, tell = os.pipe()
    before = time.time()
    child = os.fork()
    if child == 0:
        watch.start(tmp_path, 1, 2)
        watch.record_activity("scoring", 7)
        os.write(tell, b"there")
        time.sleep(HANG)
        os._exit(0)
    assert os.read(told, 5) == b"there"
    (note,) = read_notes(tmp_path, [1])
    assert (note.step, note.doing, note.gone) == (7, "scoring", False) and before <= note.time <= time.time()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(told)
    os.close(tell)
    (note,) = read_notes(tmp_path, [1])
    assert note.gone and note.at_fault


def test_errors_name_the_rank_only_with_several_processes(alone):
    watch.record_activity("scoring", 4)
    with (
        pytest.raises(ProcessFailed, match=r"^rank 0 at step 4 \(scoring\): ZeroDivisionError: division by zero"),
        watch.names_failed_rank(),
    ):
        print(1 / 0)
    (note,) = read_notes(alone, [0])
    assert note.error.startswith("ZeroDivisionError: division") and not note.lost
    with pytest.raises(KeyError), watch.names_failed_rank(KeyError):
        raise KeyError("alike on all")
    watch.stop()
    assert not list(alone.iterdir())
    with pytest.raises(ZeroDivisionError), watch.names_failed_rank():
        print(1 / 0)


def test_a_communication_error_names_the_process_at_fault(alone):
    (alone / "rank-1").write_text('{"rank": 1, "step": 3, "doing": "drawing", "time": 0, "error": "bad data"}')
    with pytest.raises(ProcessLost, match=r"rank 1 at step 3 \(drawing\) failed: bad data"), watch.names_failed_rank():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Connection reset by peer")
    (note,) = read_notes(alone, [0])
    assert note.lost


def test_a_long_error_is_cut_to_fit_a_note(alone):
    with pytest.raises(ProcessFailed), watch.names_failed_rank():
        raise ValueError("\x01\U0001f3d6" * 5000)
    (note,) = read_notes(alone, [0])
    assert note.error and (alone / "rank-0").stat().st_size == notes.LENGTH


def test_a_note_costs_one_write_of_a_page_in_memory(alone, monkeypatch):
    """300 notes are 300 writes to an open file; nothing is opened, moved, locked or synced."""
    calls, writes = [], []

    def called(frame, event, function):
        if event == "c_call" and function.__module__ in ("posix", "fcntl", "_io"):
            calls.append(function.__name__)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *given: writes.append(given) or pwrite(*given))
    before = sys.getprofile()
    sys.setprofile(called)
    try:
        for step in range(300):
            watch.record_activity("learning", step)
    finally:
        sys.setprofile(before)
    assert calls == ["pwrite"] * 300
    assert {(len(line), place) for _, line, place in writes} == {(notes.LENGTH, 0)}
    (note,) = read_notes(alone, [0])
    assert (note.doing, note.step) == ("learning", 299)


def test_the_time_limit_reaches_the_process_group(tmp_path):
    """Also 600 s, which accelerate would ignore as its own default."""

    def work(rank):
        from diffusion_align.commands.train.job import join
        from diffusion_align.options import TrainCommon

        join(TrainCommon(device="cpu", output_dir=str(tmp_path), process_timeout=600))
        group = torch.distributed.distributed_c10d._get_default_group()
        found = group._get_backend(torch.device("cpu")).options._timeout
        return int(abs(found - timedelta(seconds=600)) > timedelta(seconds=1))

    ended = launch(2, work, tmp_path)
    assert ended.codes == [0, 0], ended.text


def test_processes_that_found_different_checkpoints_do_not_start(tmp_path):
    def work(rank):
        from accelerate import Accelerator

        from diffusion_align.train.processes.agree import require_equal_ranks

        accelerator = Accelerator(cpu=True)
        require_equal_ranks(accelerator, 5, "as they should")
        with pytest.raises(ValueError, match="do not agree: 6 on one and 7 on another, as the step"):
            require_equal_ranks(accelerator, 6 + rank, "as the step")
        return 0

    ended = launch(2, work, tmp_path)
    assert ended.codes == [0, 0], ended.text


@contextmanager
def ending(act):
    try:
        yield
    finally:
        act()


@pytest.mark.parametrize("number", [0, 3])
def test_a_job_with_a_fault_ends_and_names_the_rank(world, number, monkeypatch):
    """The cases of these numbers: killed while learning, and a reward that fails."""
    # The others wait for the note of the process at fault, which two seconds suffice for only on a quiet machine.
    monkeypatch.setattr(watch, "_SETTLING", HANG)
    tally = Tally()
    processes.hurt(world, number, random.Random(number), tally, compare=False)
    assert tally.wrong == []


def test_a_stalled_process_is_named_by_the_others(tmp_path):
    """Although its note is the newest. They wait 2 s, which the command does not allow, and only from when it stands
    still: before that no process may run out of time, however slow it is."""
    dreams = tmp_path / "dreams"

    def until(files, count):
        while len(list(tmp_path.glob(files))) < count:
            time.sleep(0.01)

    def work(rank):
        from accelerate import Accelerator

        run = make_run(batch_size=6, accelerator=Accelerator(cpu=True))
        watch.start(tmp_path / ".ranks", rank, 3)
        with ending(lambda: (tmp_path / f"ended-{rank}").touch()), watch.names_failed_rank():
            for record in run.steps():
                if record.step != 2:
                    continue
                if rank == 1:
                    until("waits-*", 2)
                    watch.record_activity("dreaming")
                    dreams.touch()
                    until("ended-*", 2)
                    os._exit(9)
                (tmp_path / f"waits-{rank}").touch()
                until("dreams", 1)
                group = torch.distributed.distributed_c10d._get_default_group()
                torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
        return 0

    ended = launch(3, work, tmp_path, patience=HANG)
    for rank in (0, 2):
        assert re.search(r"rank 1 has not moved since step 2 \(dreaming\), \d+ s ago", ended.said[rank]), ended.text
    assert ended.codes == [1, 9, 1] and not ended.hung


def test_round_data_that_cannot_be_written_are_reported_and_drawn_again(world):
    tally = Tally()
    processes.no_part(world, "d3po", tally, compare=False)
    assert tally.wrong == []


def test_a_full_disk_on_rank_0_stops_no_process(world, tmp_path):
    argv = flags(world, "dpo", tmp_path / "run", "--train_batch_size=2", "--checkpointing_steps=2")
    ended = launch(2, command(argv, Fault("disk", 0, 2)), tmp_path)
    assert ended.codes == [0, 0], ended.text
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000010", "step-00000012"]  # three saves failed, from step 2 on
    assert not (tmp_path / "run" / ".ranks" / "rank-1").exists()


def test_only_rank_0_writes_shared_files(world):
    tally = Tally()
    processes.writers(world, "d3po", tally)
    assert tally.wrong == []


def test_a_signal_to_any_process_stops_all_at_the_same_step(world):
    tally = Tally()
    processes.signalled(world, 0, random.Random(0), tally)
    assert tally.wrong == []


def test_one_bad_number_skips_the_step_on_both(tmp_path):
    tally = Tally()
    equal.not_finite(tmp_path, 10, random.Random(0), tally)
    equal.in_a_row(tmp_path / "row", tally)
    assert tally.wrong == [] and sum(tally.tried.values()) == 3


def test_two_processes_equal_accumulation_2_to_the_bit(tmp_path):
    tally = Tally()
    equal.equal(tmp_path, "dpo", 3, tally)
    assert tally.wrong == []
