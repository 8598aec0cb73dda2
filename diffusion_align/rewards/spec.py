"""What a reward's text means: one reward, or several in a weighted sum or a minimum. Text only; nothing is loaded.

pickscore        pickscore@REVISION        pickscore=/models/PickScore_v1
0.5:pickscore,0.5:hpsv2.1        min:std:pickscore,imagereward        std:tiny,-0.1:jpeg-large
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path

from .catalogue import CATALOGUE

SEPARATOR = ","
_WEIGHT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?):(.+)", re.DOTALL)
_OPEN_CLIP = ("hf-hub:", "local-dir:")


@dataclass(frozen=True)
class Part:
    """One reward. `kind` is a name of the catalogue, "python", "http" or "open_clip"; `at` is the rest of its text."""

    kind: str
    at: str = ""
    revision: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Spec:
    """Parts and how they become one number: a weighted sum, or the smallest; standardised first, or not."""

    parts: tuple[Part, ...]
    standardise: bool = False
    smallest: bool = False


def read_spec(text: str) -> Spec:
    """Read a reward's text.

    Raises:
        ValueError: not a reward, with the nearest name there is; or people among others.
        FileNotFoundError: a path that is not there.
    """
    modes, rest = set(), text
    while (mode := rest.partition(":")[0]) in ("std", "min", "sum") and ":" in rest:
        modes.add(mode)
        rest = rest.partition(":")[2]
    if {"sum", "min"} <= modes:
        raise ValueError(f"reward {text!r} is either the sum or the min of its parts")
    # A folder's name may hold a comma or an equals sign: one that is there is taken whole.
    folder = rest not in ("", *CATALOGUE) and Path(rest).is_dir()
    parts = (Part("open_clip", rest),) if folder else tuple(map(read_part, rest.split(SEPARATOR)))
    if len(parts) > 1 and any(part.kind == "people" for part in parts):
        raise ValueError(f"reward {text!r}: people choose by themselves, not in a sum with others")
    return Spec(parts, "std" in modes, "min" in modes)


def read_part(text: str) -> Part:
    """Read one reward with or without a weight in front, `0.5:NAME`; raises as `read_spec` does."""
    weighted = _WEIGHT.fullmatch(text)
    weight, text = (float(weighted[1]), weighted[2]) if weighted else (1.0, text)
    if not text:
        raise ValueError("an empty reward: write NAME, or several as 0.5:NAME,0.5:NAME")
    if not math.isfinite(weight):
        raise ValueError(f"the weight of reward {text} is not a finite number")
    name, equals, path = text.partition("=")
    if equals and name in CATALOGUE:
        if not CATALOGUE[name].files and name != "clipscore":
            raise ValueError(f"reward {name} has no weights to take from {path or 'a path'}")
        if not Path(path).expanduser().exists():
            raise FileNotFoundError(f"reward {name}: no file or folder {path!r}")
        return Part(name, path, weight=weight)
    name, at, revision = text.partition("@")
    if at and name in CATALOGUE:
        if not CATALOGUE[name].repo or not revision:
            raise ValueError(f"reward {name} has no repository whose revision could be chosen")
        return Part(name, revision=revision, weight=weight)
    if text in CATALOGUE:
        return Part(text, weight=weight)
    if text.startswith("python:"):
        return Part("python", _python(text), weight=weight)
    if text.startswith(("http://", "https://")):
        return Part("http", text, weight=weight)
    _require_open_clip(text)
    return Part("open_clip", text, weight=weight)


def _python(text: str) -> str:
    """FILE.py:FUNCTION, where the file is there and the function could be a name."""
    where = text.removeprefix("python:")
    file, _, function = where.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise ValueError(f"{text!r}: a Python reward is python:FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{text!r}: no file {file}")
    return where


def _require_open_clip(text: str) -> None:
    """Refuse a slip of the pen; open_clip's own names are for open_clip to know."""
    name, colon, _ = text.partition(":")
    if text.startswith(_OPEN_CLIP) or Path(text).is_dir():
        return
    near = difflib.get_close_matches(re.split("[=@:]", text)[0].lower(), CATALOGUE, n=1, cutoff=0.6)
    if near and (not colon or "-" not in name):  # every architecture of open_clip has a dash
        raise ValueError(f"unknown reward {text}; did you mean {near[0]}?")
    if not colon:
        hint = f'; an architecture needs weights, such as "{text}:laion2b_s32b_b79k"' if "-" in text else ""
        raise ValueError(f"reward {text!r} is neither a folder nor a name of `diffusion-align reward ls`{hint}")
