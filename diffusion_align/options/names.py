"""Checks of names and texts that a user types: the nearest valid name, the format of devices and shards.

The format of `--device` is checked here without torch; whether the device exists is checked in `commands.early`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

DEVICE = "cpu, cuda, cuda:N or mps (default: the best available)"
_WORD = re.compile(r"cpu|mps|cuda(:\d+)?")
# Other names of devices. AMD's build of torch also calls its GPUs cuda.
_MEANT = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "amd": "cuda", "metal": "mps", "apple": "mps"}


class UsageError(ValueError):
    """The command line, a preset or a configuration file is wrong; the message says where, and how to correct it."""


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate most similar to `word`, or None if none is similar enough."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return found[0] if found else None


def unknown(kind: str, word: str, candidates: Iterable[str], *, otherwise: str) -> UsageError:
    """The error for a name that does not exist: with the nearest name that does, or else with `otherwise`."""
    match = nearest(word, candidates)
    return UsageError(f"unknown {kind} {word}; " + (f"did you mean {match}?" if match else otherwise))


def shard_of(text: str | None) -> tuple[int, int]:
    """(K, N) of `--shard K/N`; (0, 1) if it is not given.

    Raises:
        UsageError: it has another form.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    if found is None or int(found[1]) >= int(found[2]):
        raise UsageError(f"machine.shard must be K/N with K from 0 to N - 1, such as 0/4, not {text!r}")
    return int(found[1]), int(found[2])


def device_fault(word: str) -> str | None:
    """The end of an error message about the name of a device; None for a valid name."""
    if _WORD.fullmatch(word):
        return None
    name, colon, number = word.lower().partition(":")
    name = _MEANT.get(name, name)
    if name.isdigit() and not colon:
        name, colon, number = "cuda", ":", name
    number = number if name == "cuda" else ""
    meant = f"{name}{colon if number else ''}{number}"
    hint = f"; did you mean {meant}?" if _WORD.fullmatch(meant) else ""
    return f"must be cpu, cuda, cuda:N or mps, not {word!r}{hint}"
