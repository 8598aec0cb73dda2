"""Is a model still the one that a run was trained from? Its files may have been replaced since."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_align.system.printable import printable
from diffusion_align.train.checkpoints.directory import found as checkpoints_in

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage


def require_same_base(model: TextToImage, run: str | Path, name: str, *, named: bool) -> None:
    """Compare a base model with the fingerprint in the checkpoints of a run; a run without checkpoints has none.

    `named`: the command line names the model, so that another one is a choice: a note on stderr tells.

    Raises:
        ValueError: the files differ, and nobody named the model.
    """
    due = _fingerprint_at_training(Path(run))
    if due is None or _files_of(due) == _files_of(model.fingerprint()):
        return
    fault = f"{name} is not what {Path(run).name} was trained from: its files differ"
    if not named:
        raise ValueError(f"{fault}; --model PATH names the right one, or --model {name} takes this one")
    print(f"note: {printable(fault)}; it is taken because --model names it", file=sys.stderr)


def _fingerprint_at_training(run: Path) -> str | None:
    for folder in checkpoints_in(run / "checkpoints"):
        try:
            return json.loads((folder / "state.json").read_text("utf-8"))["identity"]["model"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged checkpoint
    return None


def _files_of(fingerprint: str) -> str:
    """The digest of the model's own files, which what was added to the model follows."""
    return re.split(r"\+|, ", fingerprint)[0]
