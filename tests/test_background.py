"""`prefetch`: the same items in the same order, a limited number in advance; errors reach the caller, threads end."""

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


def test_items_arrive_in_order():
    assert list(prefetch(range(100))) == list(range(100))
    assert list(prefetch([])) == []
    assert list(prefetch(iter([None, 1]), ahead=1)) == [None, 1]
    assert gone()


@pytest.mark.parametrize("ahead", [1, 3])
def test_at_most_ahead_items_are_made_in_advance(ahead, monkeypatch):
    """After the queue was full three times, the thread still has only the one item that does not fit."""
    made, full = [], threading.Semaphore(0)

    class Counted(queue.Queue):
        def put(self, item, timeout):
            try:
                super().put(item, timeout=0.01)
            except queue.Full:
                full.release()
                raise

    def items():
        for i in range(20):
            made.append(i)
            yield i

    monkeypatch.setattr(background.queue, "Queue", Counted)
    source = prefetch(items(), ahead=ahead)
    assert next(source) == 0
    for _ in range(3):
        assert full.acquire(timeout=HANG)
    while len(made) < ahead + 2:  # the queue may have been full before the first item was taken
        assert full.acquire(timeout=HANG)
    for _ in range(3):
        assert full.acquire(timeout=HANG)
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
    """An item is used while the next one is made: each of the two waits until the other has begun."""
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


def test_ahead_must_be_at_least_1():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        prefetch([], ahead=0)


def test_thread_uses_the_callers_cuda_device(monkeypatch):
    """Each thread has its own current CUDA device, at first 0; here a stand-in that does the same."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(current, "index", index))
    torch.cuda.set_device(3)
    assert list(prefetch(torch.cuda.current_device() for _ in range(2))) == [3, 3]


def test_cuda_is_not_initialised(monkeypatch):
    def touched(*_):
        raise AssertionError("a context would be opened")

    for name in ("current_device", "set_device"):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert list(prefetch(range(3))) == [0, 1, 2]
