"""Versions of what decides the last bits of a number, in checkpoints and against them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import version

logger = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """Of what decides the last bits of a number."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}


def warn_of_versions(saved: Mapping[str, str]) -> None:
    """Tell of those that differ from a checkpoint's: the run goes on, but perhaps not to the same bit."""
    now = versions()
    for name in saved.keys() & now.keys():
        if saved[name] != now[name]:
            logger.warning(
                "the checkpoint was saved with %s %s and goes on with %s: numbers may differ in their last digits",
                name, saved[name], now[name],
            )  # fmt: skip
