"""CPU threads: how many, who decides, and what a run records of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from stress.runs import end_of, flags, make_world, stop_at, train

from diffusion_align.commands import threads
from diffusion_align.commands.threads import Threads, Usage, fitting, others


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_cores_of_others_are_all_use_but_our_own():
    before, after = Usage(at=10.0, everyone=100.0, own=7.0), Usage(at=14.0, everyone=107.0, own=10.0)
    assert others(before, after) == pytest.approx(1.0)  # 7 CPU seconds in 4 seconds, of which 3 are ours
    assert others(after, after) == 0.0


@pytest.mark.parametrize(
    ("most", "cores", "busy", "count"),
    [(2, 2, 0.0, 2), (2, 2, 0.4, 2), (2, 2, 0.7, 1), (4, 4, 2.1, 2), (8, 16, 7.9, 8), (8, 16, 10.2, 6), (2, 2, 5.0, 1)],
)
def test_threads_are_the_cores_that_are_left(most: int, cores: int, busy: float, count: int):
    assert fitting(most, cores, busy) == count


def test_the_counters_are_those_of_this_machine():
    first = threads.usage()
    while threads.usage().own == first.own:
        sum(range(10_000))
    second = threads.usage()
    assert second.everyone - first.everyone >= 0.0 and second.own > first.own
    assert 1 <= threads.cores() <= len(threads._allowed())


def test_cores_are_limited_by_the_container_quota(tmp_path, monkeypatch):
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(threads, "CGROUP_LIMIT", limit)
    monkeypatch.setattr(threads, "_allowed", lambda: set(range(64)))
    assert threads.cores() == 64  # no such file
    limit.write_text("max 100000\n")
    assert threads.cores() == 64
    limit.write_text("250000 100000\n")
    assert threads.cores() == 3


def readings(*loads: float, own: float = 2.0) -> Callable[[], Usage]:
    """A machine where others keep so many cores busy in each ten seconds between two readings, and we `own`."""
    at = everyone = mine = 0.0
    seen = [Usage(0.0, 0.0, 0.0)]
    for load in loads:
        at, everyone, mine = at + threads.WINDOW, everyone + threads.WINDOW * (load + own), mine + threads.WINDOW * own
        seen.append(Usage(at, everyone, mine))
    return iter(seen).__next__


def test_threads_shrink_at_once_and_grow_after_an_idle_minute():
    loads = [0.1, 0.9, 1.0, *[0.1] * threads.CALM, 0.1]
    applied: list[int] = []
    ours = Threads(2, True, 2, 2, read=readings(*loads), apply=applied.append)
    said = [ours.adjust() for _ in loads]
    assert applied == [2, 1, 2]
    assert [i for i, line in enumerate(said) if line] == [1, 2 + threads.CALM]
    assert said[1] == "other programs use 0.9 of 2 cores: 1 CPU threads, 2 before"


def test_short_idle_periods_do_not_add_threads():
    loads = [1.0, *[0.1] * (threads.CALM - 1), 1.0, *[0.1] * (threads.CALM - 1)]
    ours = Threads(1, True, 2, 2, read=readings(*loads), apply=lambda count: None)
    assert [ours.adjust() for _ in loads] == [None] * len(loads) and ours.count == 1


def test_thread_counts_of_the_user_are_kept(monkeypatch):
    monkeypatch.setattr(threads, "STARTED", [Usage(0.0, 0.0, 0.0)])
    monkeypatch.setattr(threads, "usage", lambda: Usage(10.0, 1e6, 0.0))
    said: list[str] = []
    asked = threads.set_threads(3, environment={}, say=said.append)
    assert asked.count == torch.get_num_threads() == 3 and not asked.chosen
    torch.set_num_threads(2)  # as torch does by itself for OMP_NUM_THREADS
    given = threads.set_threads(environment={"OMP_NUM_THREADS": "2"}, say=said.append)
    assert given.count == torch.get_num_threads() == 2 and given.adjust() is None and not said


def test_by_default_threads_follow_the_free_cores(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(threads, "STARTED", [Usage(0.0, 0.0, 0.0)])
    monkeypatch.setattr(threads, "usage", lambda: Usage(10.0, 14.0, 4.0))
    torch.set_num_threads(2)
    said: list[str] = []
    found = threads.set_threads(environment={}, say=said.append)
    assert found.count == torch.get_num_threads() == 1 and found.chosen
    assert said == ["1 CPU thread, as other programs use 1.0 of 2 cores (--threads N sets another number)"]


def test_a_resumed_run_uses_the_threads_of_its_checkpoint(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(threads, "STARTED", [Usage(0.0, 0.0, 0.0)])
    monkeypatch.setattr(threads, "usage", lambda: Usage(10.0, 14.0, 4.0))
    torch.set_num_threads(1)
    assert threads.set_threads(resumed=2, environment={}, say=lambda line: None).count == torch.get_num_threads() == 2
    assert (
        threads.set_threads(resumed=16, environment={}, say=lambda line: None).count == 2
    )  # moved to a smaller machine


def test_a_run_records_its_threads_and_goes_on_with_them(tmp_path, monkeypatch):
    """Beside a busy program a run has one thread of two; gone on with when all is quiet, it still has one."""
    for name in threads.SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    torch.set_num_threads(2)
    world, run = make_world(tmp_path / "world"), tmp_path / "run"

    def beside(busy: float) -> None:
        seen = readings(*[busy] * 1000)
        seen()
        monkeypatch.setattr(threads, "usage", seen)
        monkeypatch.setattr(threads, "record_usage", lambda: threads.STARTED.__setitem__(slice(None), [seen()]))

    beside(1.0)
    assert train(flags(world, "d3po", run), stop_at(2, signal.SIGTERM))[0] == 128 + signal.SIGTERM
    assert end_of(run)[0].state["threads"] == 1
    torch.set_num_threads(2)
    beside(0.0)
    monkeypatch.setattr(threads, "CALM", 1000)  # the quiet machine would give the run its second thread back
    assert train(flags(world, "d3po", run, "--resume_from_checkpoint=latest"))[0] == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["threads"] for row in rows} == {1}
