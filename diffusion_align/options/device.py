"""The word of `--device`: what it may be is known without torch; whether it is there, `commands.early` knows."""

from __future__ import annotations

import re

DEVICE = "cpu, cuda, cuda:N or mps (default: the best there is)"
_WORD = re.compile(r"cpu|mps|cuda(:\d+)?")
# What people call them elsewhere. AMD's build of torch calls its GPUs cuda too.
_MEANT = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "amd": "cuda", "metal": "mps", "apple": "mps"}


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
