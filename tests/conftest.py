"""Strict: nothing reaches for the network, and the global generator stays where it was."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread: a busy neighbour then costs a test its share of the core and no more. It also keeps the command from
# choosing the number by the load of the machine, on which the last bits of a run would hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _global_generator_untouched(request: pytest.FixtureRequest):
    """No room of the package may draw from torch's global generator: a test that sees it move fails."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    yield
    if request.node.get_closest_marker("moves_global_rng") is None:
        assert torch.equal(before, torch.random.get_rng_state()), "something drew from torch's global random generator"
