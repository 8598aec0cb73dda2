"""The folder of numbered pictures and samples.json that `sample` writes, which holds pictures of one command only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LISTING = "samples.json"
_NUMBERED = re.compile(r"\d{4,}-\d{2,}\.png")


def listing(prompts: Sequence[str], per_prompt: int) -> list[dict[str, Any]]:
    """The file and prompt of each picture. Files are named by numbers, because a prompt may hold anything."""
    return [
        {"file": f"{number:04d}-{image:02d}.png", "prompt": prompt, "prompt_number": number, "image": image}
        for number, prompt in enumerate(prompts)
        for image in range(per_prompt)
    ]


def claim(out: Path, about: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check that the folder may take the pictures that `about` names; `overwrite` removes those of an earlier command.

    The same command may run again, also after an interruption, and draws the same pictures again.

    Raises:
        ValueError: the folder holds pictures of another command.
    """
    present = {path.name for path in out.iterdir() if _NUMBERED.fullmatch(path.name)} if out.is_dir() else set()
    known, text = out / LISTING, json.loads(json.dumps(dict(about)))  # through JSON, as the earlier one went
    if overwrite:
        for name in (*present, LISTING):
            (out / name).unlink(missing_ok=True)
        return
    old = _read(known) if known.is_file() else {}
    other = sorted(key for key in text if old is None or (key in old and old[key] != text[key]))
    left = present - {entry["file"] for entry in about["pictures"]}
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
