"""Strict: nothing reaches for the network, and the global generator stays where it was."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side: a thread each, for them and for what they start. Threads that spin for one another on the
    # same cores take many times as long as one alone. It is read when torch is imported, hence before it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

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
