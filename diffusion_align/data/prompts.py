"""Lists of prompts: a .txt with one a line, a JSON list, JSON lines with a prompt each."""

import os
from pathlib import Path

from diffusion_align.data.readers import BadRow, DataError
from diffusion_align.data.recognise import recognise, rows

_LAYOUTS = "a .txt with one prompt a line, a JSON list of texts, or .jsonl with a prompt each"


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a file, in order.

    Raises:
        DataError: not a list of prompts, a row without one, or none at all.
    """
    source = recognise(Path(path), layouts=_LAYOUTS)
    if source.format.holds != "prompts":
        raise DataError(f"{path}: {source.format.name}, not prompts; give {_LAYOUTS}")
    prompts = []
    for row in rows(source):
        if isinstance(row, BadRow):
            raise DataError(f"{path}: {row.row} {row.reason}; give {_LAYOUTS}")
        prompts += [row.prompt] if row.prompt.strip() else []
    if not prompts:
        raise DataError(f"{path}: holds no prompt; give {_LAYOUTS}")
    return prompts
