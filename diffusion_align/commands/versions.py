"""Versions of the packages that affect rounding, to save in checkpoints and to compare on a resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import version

logger = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """Versions of the packages that affect rounding."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}


def warn_of_versions(saved: Mapping[str, str]) -> None:
    """Warn of versions that differ from those of a checkpoint: results may differ in rounding."""
    now = versions()
    for name in saved.keys() & now.keys():
        if saved[name] != now[name]:
            logger.warning(
                "the checkpoint was saved with %s %s and continues with %s: numbers may differ in their last digits",
                name, saved[name], now[name],
            )  # fmt: skip
