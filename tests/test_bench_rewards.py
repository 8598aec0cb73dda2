"""The bench of rewards at its smallest: its tables, and that its second one measures waiting and nothing else."""

import importlib.util
import time
from pathlib import Path

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


def drawing(chunks, seconds):
    """Chunks that take their time without a processor, so that the clock alone decides."""

    def make(busy):
        for _ in range(chunks):
            time.sleep(seconds)
            busy.append(seconds)
            yield torch.zeros(1, 3, 2, 2), ["a"]

    return make


def scoring(seconds):
    def reward(pictures, prompts):
        time.sleep(seconds)
        return torch.zeros(len(prompts))

    return reward


def test_the_share_of_waiting_is_what_the_clock_says(bench):
    """Five chunks drawn in 40 ms and scored in 40 ms: in turn half of the time is waiting, one behind a sixth is."""
    turn = bench.loop(drawing(5, 0.04), scoring(0.04), behind=False)
    assert 0.4 <= turn.seconds < 0.8 and turn.waited / turn.seconds == pytest.approx(1 / 2, abs=0.1)
    share, behind, gain = bench.overlap(drawing(5, 0.04), scoring(0.04), 3)
    assert share == pytest.approx(1 / 2, abs=0.1) and behind == pytest.approx(1 / 6, abs=0.1)
    assert gain == pytest.approx(10 / 6, abs=0.3)


def test_a_reward_that_costs_nothing_leaves_nothing_to_gain(bench):
    share, behind, gain = bench.overlap(drawing(4, 0.03), scoring(0.0), 3)
    assert share < 0.1 and behind < 0.1 and gain == pytest.approx(1, abs=0.15)


def test_a_slow_server_is_waited_for_less_when_it_is_asked_one_chunk_behind(bench, capsys):
    argv = "--rewards jpeg-small --pictures 4 --repeats 3 --chunks 5 --chunk 4 --steps 1 --device cpu".split()
    assert bench.main(argv) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = next(row for row in rows if row[:1] == ["jpeg-small"])
    assert len(first) == 6 and float(first[1]) > 0
    turn, behind, gain = (float(cell.strip("%")) for cell in next(row for row in rows if row[:1] == ["slow,"])[-3:])
    assert turn > behind and turn > 15 and gain > 1
