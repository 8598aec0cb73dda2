"""Working ahead: the same items in the same order, never too far, with every error told and no thread left behind."""

import queue
import threading

import pytest
import torch
from helpers_machine import HANG

from diffusion_align.rewards import prefetch
from diffusion_align.system import background


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


def test_work_is_done_on_the_device_that_is_current_where_it_is_asked_for(monkeypatch):
    """CUDA's current device is each thread's own and begins at 0; here a stand-in of the same kind."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(current, "index", index))
    torch.cuda.set_device(3)
    assert list(prefetch(torch.cuda.current_device() for _ in range(2))) == [3, 3]


def test_no_device_is_touched_where_cuda_has_not_begun(monkeypatch):
    def touched(*_):
        raise AssertionError("a context would be opened")

    for name in ("current_device", "set_device"):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert list(prefetch(range(3))) == [0, 1, 2]
