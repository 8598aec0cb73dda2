"""Nearest names: what a person probably meant to type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The command line, a preset or a configuration file is wrong; the message says where and what would be right."""


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `word`, or None where nothing is near enough to be worth suggesting."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(kind: str, word: str, candidates: Iterable[str], *, otherwise: str) -> UsageError:
    """The error for a name that does not exist: the nearest one that does, or else `otherwise`, where to look."""
    match = nearest(word, candidates)
    return UsageError(f"unknown {kind} {word}; " + (f"did you mean {match}?" if match else otherwise))
