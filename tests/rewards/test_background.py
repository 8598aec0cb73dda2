"""Working ahead: the same items in the same order, never too far, with every error told and no thread left behind."""

import queue
import threading

import pytest
from helpers_machine import HANG

from diffusion_align.rewards import background, prefetch


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def gone():
    for worker in workers():
        worker.join(HANG)
    return not workers()


def test_items_come_in_their_order():
    assert list(prefetch(range(100))) == list(range(100))
    assert list(prefetch([])) == []
    assert list(prefetch(iter([None, 1]), ahead=1)) == [None, 1]
    assert gone()


@pytest.mark.parametrize("ahead", [1, 3])
def test_it_runs_ahead_and_no_further(ahead, monkeypatch):
    """Turned away from a full queue three times, the worker still holds the one item that it made for it."""
    made, turned_away = [], threading.Semaphore(0)

    class Counted(queue.Queue):
        def put(self, item, timeout):
            try:
                super().put(item, timeout=0.01)
            except queue.Full:
                turned_away.release()
                raise

    def items():
        for i in range(20):
            made.append(i)
            yield i

    monkeypatch.setattr(background.queue, "Queue", Counted)
    source = prefetch(items(), ahead=ahead)
    assert next(source) == 0
    for _ in range(3):
        assert turned_away.acquire(timeout=HANG)
    while len(made) < ahead + 2:  # these may have been turned away before the first one was taken
        assert turned_away.acquire(timeout=HANG)
    for _ in range(3):
        assert turned_away.acquire(timeout=HANG)
    assert len(made) == ahead + 2
    source.close()
    assert gone()


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise KeyError("third")

    got = []
    with pytest.raises(KeyError, match="third"):
        for item in prefetch(items()):
            got.append(item)
    assert got == [1, 2] and gone()


def test_making_and_using_overlap():
    """An item is used while the next one is being made: each of the two waits until the other has begun."""
    both = threading.Barrier(2, timeout=HANG)

    def items():
        yield 0
        for i in range(1, 20):
            both.wait()
            yield i

    for i in prefetch(items()):
        if i < 19:
            both.wait()
    assert gone()


def test_one_ahead_at_least():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        prefetch([], ahead=0)
