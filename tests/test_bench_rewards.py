"""The benchmark of rewards at a small size: both tables, and that the second one measures waiting only."""

import importlib.util
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parent.parent / "scripts" / "bench_rewards.py"
    spec = importlib.util.spec_from_file_location("bench_rewards", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    """A clock that moves only in `sleep`, and `prefetch` simulated on it.

    The maker and the user each have a time of their own. An item is begun once the one before it has been put into the
    queue, and taken once it is finished and the one before it has been used.
    """

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def prefetch(self, items, ahead):
        begun, taken, source = self.now, [], iter(items)
        while True:
            user, self.now = self.now, begun
            item = next(source, None)
            finished, self.now = self.now, user
            if item is None:
                return
            # The queue has room for it when the one `ahead` places before it has been taken.
            begun = max(finished, taken[-ahead]) if len(taken) >= ahead else finished
            self.now = max(user, finished)
            taken.append(self.now)
            yield item


@pytest.fixture
def clock(bench, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(bench, "prefetch", clock.prefetch)
    return clock


def drawing(clock, chunks, seconds):
    def make(busy):
        for _ in range(chunks):
            clock.sleep(seconds)
            busy.append(seconds)
            yield torch.zeros(1, 3, 2, 2), ["a"]

    return make


def scoring(clock, seconds):
    def reward(pictures, prompts):
        clock.sleep(seconds)
        return torch.zeros(len(prompts))

    return reward


def test_share_of_waiting_by_hand(bench, clock):
    """Five chunks drawn in 40 ms and scored in 40 ms: in turn half of the time is waiting, one behind a sixth is."""
    turn = bench.loop(drawing(clock, 5, 0.04), scoring(clock, 0.04), behind=False)
    assert turn.seconds == pytest.approx(0.4) and turn.waited == pytest.approx(0.2)
    found = bench.overlap(drawing(clock, 5, 0.04), scoring(clock, 0.04), 3)
    assert found == pytest.approx((1 / 2, 1 / 6, 10 / 6))
    # A reward twice as slow as drawing keeps the loop waiting even one behind: 0.04 + 5 x 0.08 = 0.44, drawn in 0.2.
    found = bench.overlap(drawing(clock, 5, 0.04), scoring(clock, 0.08), 3)
    assert found == pytest.approx((2 / 3, 24 / 44, 60 / 44))


def test_a_reward_that_costs_nothing_leaves_nothing_to_gain(bench, clock):
    found = bench.overlap(drawing(clock, 4, 0.03), scoring(clock, 0.0), 3)
    assert found == pytest.approx((0, 0, 1), abs=1e-12)


def test_background_scoring_shortens_the_wait_for_a_slow_server(bench, clock, capsys, monkeypatch):
    @contextmanager
    def slow_server():
        yield scoring(clock, bench.SLOW)

    monkeypatch.setattr(bench, "slow_server", slow_server)
    monkeypatch.setattr(bench, "chunks_of", lambda model, chunks, size, steps, busy: drawing(clock, chunks, 0.05)(busy))
    args = SimpleNamespace(chunks=5, chunk=4, steps=1, repeats=3)
    bench.print_overlap([("mine", scoring(clock, 0.0))], SimpleNamespace(source="tiny"), args)
    rows = [line.split()[-3:] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert rows == [["0.0%", "0.0%", "1.00"], ["50.0%", "16.7%", "1.67"]]


def test_the_slow_server_takes_its_time_over_http(bench, clock):
    with bench.slow_server() as reward:
        scores = reward(torch.full((2, 3, 8, 8), 0.2), ["a", "b"])
    assert clock.now == bench.SLOW and scores.tolist() == pytest.approx([0.2, 0.2])


def test_both_tables_are_printed_by_a_real_run(bench, capsys):
    argv = "--rewards jpeg-small --pictures 4 --repeats 1 --chunks 2 --chunk 4 --steps 1 --device cpu".split()
    assert bench.main(argv) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = next(row for row in rows if row[:1] == ["jpeg-small"])
    assert len(first) == 6 and float(first[1]) > 0
    shares = [float(cell.strip("%")) for cell in next(row for row in rows if row[:1] == ["slow,"])[-3:]]
    assert all(0 <= share <= 100 for share in shares[:2]) and shares[2] > 0
