"""The folder of numbered pictures and samples.json that `sample` writes: what an earlier one left is not mixed in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAMPLES = "samples.json"
_NUMBERED = re.compile(r"\d{4,}-\d{2,}\.png")


def claim(out: Path, about: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the folder ready for the pictures that `about` names, before a model is loaded.

    The same command again draws the same pictures again, also where it was cut off.

    Raises:
        ValueError: the folder holds pictures of another command, and nobody has said that they may go.
    """
    there = {path.name for path in out.iterdir() if _NUMBERED.fullmatch(path.name)} if out.is_dir() else set()
    known, text = out / SAMPLES, json.loads(json.dumps(dict(about)))  # through JSON, as the earlier one went
    if overwrite:
        for name in (*there, SAMPLES):
            (out / name).unlink(missing_ok=True)
        return
    old = _read(known) if known.is_file() else {}
    other = sorted(key for key in text if old is None or (key in old and old[key] != text[key]))
    left = there - {entry["file"] for entry in about["pictures"]}
    if other or left:
        what = f"made with other {', '.join(other)}" if other and old is not None else "of another command"
        raise ValueError(f"{out} holds pictures {what}: --overwrite removes them, another --out leaves them alone")


def _read(path: Path) -> dict[str, Any] | None:
    """An earlier samples.json; None where it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
