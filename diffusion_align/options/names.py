"""What a person typed: the nearest names where there is none such, and the few texts with a form of their own.

What `--device` may be is known here, without torch; whether it is there, `commands.early` knows.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

DEVICE = "cpu, cuda, cuda:N or mps (default: the best there is)"
_WORD = re.compile(r"cpu|mps|cuda(:\d+)?")
# What people call them elsewhere. AMD's build of torch calls its GPUs cuda too.
_MEANT = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "amd": "cuda", "metal": "mps", "apple": "mps"}


class UsageError(ValueError):
    """The command line, a preset or a configuration file is wrong; the message says where and what would be right."""


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate most like `word`, or None where nothing is near enough to be worth suggesting."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return found[0] if found else None


def unknown(kind: str, word: str, candidates: Iterable[str], *, otherwise: str) -> UsageError:
    """The error for a name that does not exist: the nearest one that does, or else `otherwise`, where to look."""
    match = nearest(word, candidates)
    return UsageError(f"unknown {kind} {word}; " + (f"did you mean {match}?" if match else otherwise))


def shard_of(text: str | None) -> tuple[int, int]:
    """(K, N) of `--shard K/N`; the whole, where nothing is given, is 0 of 1.

    Raises:
        UsageError: it is not of that form.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    if found is None or int(found[1]) >= int(found[2]):
        raise UsageError(f"machine.shard must be K/N with K from 0 to N - 1, such as 0/4, not {text!r}")
    return int(found[1]), int(found[2])


def device_fault(word: str) -> str | None:
    """What is wrong with a device's name, as the end of a sentence; None for a good one."""
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
