"""Checks the JSON files of a pipeline's components before diffusers and transformers act on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..system.plain_json import read_json, require_modest, require_no_code

MAX_TOKENS = 100_000


def require_plain_files(folder: Path, classes: dict[str, str]) -> None:
    """Check the JSON files of each component; `classes` names the class that each must have.

    Raises:
        ValueError: in one line, the file, the key, and what is wrong with it.
    """
    for component, expected in classes.items():
        for path in sorted((folder / component).glob("*.json")):
            if path.name.endswith(".index.json"):
                _require_names(path, read_json(path).get("weight_map"))
            elif path.name in ("config.json", "scheduler_config.json"):
                _require_config(path, read_json(path), expected)
            elif path.name == "tokenizer_config.json":
                _require_tokenizer(path, read_json(path))


def _require_config(path: Path, content: dict[str, Any], expected: str) -> None:
    require_no_code(path, content)
    require_modest(path, content)
    found = content.get("_class_name", expected)
    if expected and found != expected:
        raise ValueError(f"{path} is of the class {found!r:.90}, where {expected} is needed")


def _require_names(path: Path, names: Any) -> None:
    """An index says which file holds each weight, and the loaders would open any path."""
    for name in names.values() if isinstance(names, dict) else [names]:
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\\" in name:
            raise ValueError(f"{path} names the file {name!r:.90}, which is not in this folder: fetch the model again")


def _require_tokenizer(path: Path, content: dict[str, Any]) -> None:
    require_no_code(path, content)
    length = content.get("model_max_length", 0)
    if not isinstance(length, int | float) or not 0 <= length <= MAX_TOKENS:
        raise ValueError(f"{path}: model_max_length is {length!r:.40}, and every prompt would be padded to it")
