"""Options that name files and folders: `~` is expanded, and saved paths are absolute.

`Option.path` is the kind of an option's text:

    in       a file or folder that is read
    folder   a folder that is written; file: a file that is written; output: a file or a folder that is written
    name     a path if it exists, else a name (`tiny`, owner/name on the hub)
    reward   the text of a reward, which may contain paths: pickscore=/models/x, python:FILE.py:FUNCTION
    inside   a folder inside the output folder, unless it is absolute
    resume   a checkpoint: latest, auto, the name of one, or a path
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_align.rewards.catalogue import CATALOGUE

from ..names import UsageError
from ..schema import Option, options_of

KINDS = ("in", "folder", "file", "output", "name", "reward", "inside", "resume")
_HOME = re.compile(r"(^|[=:,])(~[^/=:,]*)(?=/|$)")
_NUMBER = re.compile(r"[+-]?[\d.]+(?:[eE][+-]?\d+)?")


def expanded(option: Option, value: Any, origin: str) -> Any:
    """An option's value, a text or several, with `~` replaced by the home folder.

    Raises:
        UsageError: `~name` of an unknown user.
    """

    def expand(text: str) -> str:
        return _HOME.sub(home, text) if option.path == "reward" else home_of(text)

    def home(match: re.Match[str]) -> str:
        return match[1] + home_of(match[2])

    def home_of(text: str) -> str:
        path = os.path.expanduser(text)
        if text.startswith("~") and path == text:
            raise UsageError(f"{origin}: {option.key}: this machine has no user {text.partition('/')[0]}: {text}")
        return path

    return _each(expand, value) if option.path else value


def absolute_paths(option: Option, value: Any) -> Any:
    """The value of an option with absolute paths, so that it means the same in every folder; names stay names."""
    made = dict.fromkeys(("in", "folder", "file", "output"), os.path.abspath)
    made |= {"name": _absolute_name, "reward": absolute_reward}
    return _each(made[option.path], value) if option.path in made else value


def _each(change: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(change(text) for text in value)
    return change(value) if isinstance(value, str) else value


def _absolute_name(text: str) -> str:
    return os.path.abspath(text) if text != "tiny" and os.path.exists(text) else text


def absolute_reward(text: str) -> str:
    """The text of a reward with absolute paths."""
    if text not in CATALOGUE and os.path.isdir(text):  # a folder's name may hold a comma or an equals sign
        return os.path.abspath(text)

    def make_absolute(match: re.Match[str]) -> str:
        word = match[0]
        name = word in CATALOGUE or _NUMBER.fullmatch(word) or not os.path.exists(word)
        return word if name else os.path.abspath(word)

    return ",".join(part if _elsewhere(part) else re.sub(r"[^=:]+", make_absolute, part) for part in text.split(","))


def without_folders(reward: str) -> str:
    """The text of a reward with the last name of each path only, independent of folders."""
    parts = [part if _elsewhere(part) else re.sub(r"[^=:]*/([^/=:]+)", r"\1", part) for part in reward.split(",")]
    return ",".join(parts)


def _elsewhere(part: str) -> bool:
    """Whether one reward of a text is an address on another machine, which contains slashes too."""
    return "://" in part or "hf-hub:" in part


def require_outputs(options: Any) -> None:
    """Check, before anything is loaded, that all output folders and files can be written.

    Raises:
        UsageError: naming the option and the reason.
    """
    for name, option in options_of(type(options)).items():
        value = getattr(options, name)
        if option.path in ("folder", "file", "output") and value is not None:
            _require_output(option, Path(value))


def _require_output(option: Option, path: Path) -> None:
    what = f"{option.key} {path}"
    if option.path == "file" and path.is_dir():
        raise UsageError(f"{what} is a folder: give the name of a file in it")
    is_folder = option.path == "folder" or (option.path == "output" and path.is_dir())
    place = path if is_folder else path.parent
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        kind = "is a broken link" if place.is_symlink() and not place.exists() else "is not a folder"
        where = "it" if place == path else str(place)
        raise UsageError(f"{what} cannot be made, as {where} {kind}: give another --{option.name}")
    try:
        # Only an attempt shows it: permissions, a read-only disk, a system folder.
        os.rmdir(tempfile.mkdtemp(prefix=".tmp-", dir=place))
    except OSError as error:
        raise UsageError(f"{what} cannot be written: {place}: {error.strerror}; give another --{option.name}") from None
