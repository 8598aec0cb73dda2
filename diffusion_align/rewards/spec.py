"""The text of a reward, parsed: one reward, or several in a weighted sum or a minimum. Loads nothing, needs no torch.

pickscore        pickscore@REVISION        pickscore=/models/PickScore_v1
0.5:pickscore,0.5:hpsv2.1        min:std:pickscore,imagereward        std:tiny,-0.1:jpeg-large
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from .catalogue import CATALOGUE

TINY_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "tiny_clip"
CONFIG_FILE = "open_clip_config.json"
_WEIGHT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?):(.+)", re.DOTALL)
_OPEN_CLIP = ("hf-hub:", "local-dir:")


class UnknownReward(ValueError):
    """No reward has this name."""


@dataclass(frozen=True)
class RewardPart:
    """One reward. `kind` is a name of the catalogue, "python", "http" or "open_clip"; `at` is the rest of its text."""

    kind: str
    at: str = ""
    revision: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class RewardSpec:
    """Rewards and how they become one number: their weighted sum, or the smallest; standardised first, or not."""

    parts: tuple[RewardPart, ...]
    standardise: bool = False
    smallest: bool = False
    text: str = field(default="", compare=False)

    @property
    def reads_prompts(self) -> bool:
        """Whether any of the rewards looks at the prompt."""
        return any(part.kind not in CATALOGUE or CATALOGUE[part.kind].reads_prompt for part in self.parts)

    def __str__(self) -> str:
        return self.text


def read_spec(text: str) -> RewardSpec:
    """Parse a reward's text.

    Raises:
        ValueError: not a reward (the message has the nearest name), or people beside other rewards.
        FileNotFoundError: a path that does not exist.
    """
    modes, rest = set(), text
    while (mode := rest.partition(":")[0]) in ("std", "min", "sum") and ":" in rest:
        modes.add(mode)
        rest = rest.partition(":")[2]
    if {"sum", "min"} <= modes:
        raise ValueError(f"reward {text!r} is either the sum or the min of its parts")
    # A folder's name may contain a comma or an equals sign, so an existing folder is not split.
    folder = rest not in ("", *CATALOGUE) and Path(rest).is_dir()
    parts = (_open_clip_part(rest),) if folder else tuple(map(_read_part, rest.split(",")))
    if len(parts) > 1 and any(part.kind == "people" for part in parts):
        raise ValueError(f"reward {text!r}: people choose by themselves, not in a sum with others")
    return RewardSpec(parts, "std" in modes, "min" in modes, text)


def _read_part(text: str) -> RewardPart:
    """Parse one reward with or without a weight, `0.5:NAME`; raises as `read_spec` does."""
    weighted = _WEIGHT.fullmatch(text)
    weight, text = (float(weighted[1]), weighted[2]) if weighted else (1.0, text)
    if not text:
        raise ValueError("an empty reward: write NAME, or several as 0.5:NAME,0.5:NAME")
    if not math.isfinite(weight):
        raise ValueError(f"the weight of reward {text} is not a finite number")
    if text in CATALOGUE:
        if text == "tiny":
            resolve_source(text)
        return RewardPart(text, weight=weight)
    name, equals, path = text.partition("=")
    if equals and name in CATALOGUE:
        if not CATALOGUE[name].files and name != "clipscore":
            raise ValueError(f"reward {name} has no weights to take from {path or 'a path'}")
        if not Path(path).expanduser().exists():
            raise FileNotFoundError(f"reward {name}: no file or folder {path!r}")
        return RewardPart(name, path, weight=weight)
    name, at, revision = text.partition("@")
    if at and name in CATALOGUE:
        if not CATALOGUE[name].repo or not revision:
            raise ValueError(f"reward {name} has no repository whose revision could be chosen")
        return RewardPart(name, revision=revision, weight=weight)
    if text.startswith("python:"):
        return RewardPart("python", _python_function(text), weight=weight)
    if text.startswith(("http://", "https://")):
        return RewardPart("http", text, weight=weight)
    return _open_clip_part(text, weight)


def _python_function(text: str) -> str:
    """FILE.py:FUNCTION, if the file exists and the function is an identifier."""
    where = text.removeprefix("python:")
    file, _, function = where.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise ValueError(f"{text!r}: a Python reward is python:FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{text!r}: no file {file}")
    return where


def _open_clip_part(text: str, weight: float = 1.0) -> RewardPart:
    """An open_clip model; raises ValueError for a misspelt name of the catalogue."""
    name, colon, _ = text.partition(":")
    if not text.startswith(_OPEN_CLIP) and not Path(text).is_dir():
        near = difflib.get_close_matches(re.split("[=@:]", text)[0].lower(), CATALOGUE, n=1, cutoff=0.6)
        if near and (not colon or "-" not in name):  # every architecture of open_clip has a dash
            raise ValueError(f"unknown reward {text}; did you mean {near[0]}?")
        if not colon:
            hint = f'; an architecture needs weights, such as "{text}:laion2b_s32b_b79k"' if "-" in text else ""
            raise UnknownReward(f"reward {text!r} is neither a folder nor a known name{hint}")
    resolve_source(text)
    return RewardPart("open_clip", text, weight=weight)


def resolve_source(source: str | Path) -> tuple[str, str | None]:
    """open_clip's own (model name, pretrained tag or file) of a source; loads and downloads nothing.

    Raises:
        ValueError: a folder that is not in open_clip's format, or a name without weights.
    """
    text = str(source)
    if text.startswith(_OPEN_CLIP):
        return text, None
    folder = TINY_FOLDER if text == "tiny" else Path(text)
    if text == "tiny" or folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            build = " (scripts/build_tiny.py writes it)" if text == "tiny" else ""
            raise ValueError(f"no {CONFIG_FILE} in {folder}: not an open_clip folder{build}")
        return f"local-dir:{folder}", None
    name, _, pretrained = text.partition(":")
    if not pretrained:  # without a tag open_clip would take random weights and only log a warning
        raise ValueError(
            f'{text!r} is neither a folder nor "hf-hub:owner/name"; an architecture needs weights, '
            f'such as "{name}:laion2b_s32b_b79k" or "{name}:weights.pt"'
        )
    return name, pretrained
