"""Strict: nothing reaches for the network, and the global generator stays where it was."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread for each test and for what it starts, as tests run side by side: threads that spin for one another on the
# same cores take many times as long. It also keeps the command from choosing the number by the load of the machine, on
# which the last bits of a run would hang. Torch reads it when it is imported, hence before that.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Ctrl-C is ignored in what a shell runs in the background, and by all that such a process starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "ROUNDING" in os.environ:
    from other_rounding import pytest_sessionfinish, pytest_sessionstart  # noqa: F401


@pytest.fixture(autouse=True)
def _global_generator_untouched(request: pytest.FixtureRequest):
    """No room of the package may draw from torch's global generator: a test that sees it move fails."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    yield
    if request.node.get_closest_marker("moves_global_rng") is None:
        assert torch.equal(before, torch.random.get_rng_state()), "something drew from torch's global random generator"
