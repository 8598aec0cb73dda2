"""Reads a model's JSON files and refuses those that ask for code or for absurd amounts of memory.

The loaders of other libraries import classes and kernels that such a file names, open its files, and allocate arrays of
its sizes. So it is checked here first, and refused if it asks for what these models do not need.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20
MAX_NUMBER = 10_000_000
MAX_LAYERS = 200  # CLIP-bigG's image tower has 48
MAX_ITEMS = 10_000
# Each of these makes a loader run code that comes with the model.
_CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "custom_generate", "trust_remote_code")
_ATTENTION = (None, "eager", "sdpa")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        FileNotFoundError: no such file. ValueError: it holds no object, or is larger than MAX_BYTES.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has over {MAX_BYTES:,} bytes, which no configuration has: fetch the model again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({str(error)[:200]}): fetch the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is a {type(content).__name__}, not an object: fetch the model again")
    return content


def require_no_code(path: object, content: dict[str, Any]) -> None:
    """Raise ValueError if a configuration names code to run."""
    for key, value in _items(content):
        if key in _CODE and value not in (None, False, [], {}):
            raise ValueError(f"{path} sets {key}: it asks for code that comes with the model, which is never run here")
        if key.endswith("attn_implementation") and value not in _ATTENTION:
            raise ValueError(f"{path} sets {key} to {value!r:.90}: a kernel from elsewhere, never fetched here")


def require_modest(path: object, content: dict[str, Any]) -> None:
    """Raise ValueError if a number or a list is larger than in any known model of these formats."""
    for key, value in _items(content):
        limit = MAX_LAYERS if "layers" in key else MAX_NUMBER
        if isinstance(value, int | float) and math.isfinite(value) and abs(value) > limit:
            raise ValueError(f"{path}: {key} is {value!s:.40}, over {limit:,}: no model of these formats is so large")
        if isinstance(value, list) and len(value) > MAX_ITEMS:
            raise ValueError(f"{path}: {key} is a list of {len(value):,}, over {MAX_ITEMS:,}: fetch the model again")


def _items(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every (key, value) inside a JSON value; the items of a list have the list's key."""
    yield key, value
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _items(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _items(item, key)
