"""Files that are named by split: train-00000-of-00002.parquet, metadata-test.parquet, test.json."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.rows.archives.zip_members import ZipMember

SPLITS = ("train", "validation", "valid", "val", "test", "dev")
File = TypeVar("File", Path, ZipMember)


def of_split(where: Path, files: Sequence[File], split: str) -> list[File]:
    """The files of a split where some are named by one; else all. DataError if there are none of this split."""
    names = {file: next((w for w in re.split(r"[-_.]", file.stem.lower()) if w in SPLITS), "") for file in files}
    if not any(names.values()):
        return list(files)
    chosen = [file for file in files if names[file] == split]
    if not chosen:
        found = ", ".join(sorted(set(names.values()) - {""}))
        raise DataError(f"{where}: holds no split {split!r}, only {found}")
    return chosen
