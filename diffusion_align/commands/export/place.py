"""Where an export is written, completely or not at all, and what may be replaced there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_align.options import UsageError
from diffusion_align.options.export import SUFFIX

DEFAULT_FOLDER = "exports"


def place_of(output: str | None, name: str, *, is_file: bool) -> Path:
    """The path to write: `output`, or below `exports` if it is not given.

    A file gets the name of the export inside an `output` that is a folder. Raises UsageError for a file of another
    ending, which no program would read.
    """
    name = name + SUFFIX if is_file else name
    if output is None:
        return Path(DEFAULT_FOLDER) / name
    path = Path(output)
    if not is_file:
        return path
    if path.is_dir() or output.endswith(os.sep):
        return path / name
    if path.suffix != SUFFIX:
        raise UsageError(f"output.output {output}: give a name that ends in {SUFFIX}, or an existing folder")
    return path


def require_replaceable(path: Path, name: str, *, is_file: bool, overwrite: bool) -> None:
    """Check, before anything is loaded, that the place is free, or that `overwrite` may replace what is there.
    `name`: of the export.

    Raises:
        UsageError: it is not, and what to do.
    """
    if not path.exists() or (not is_file and path.is_dir() and not any(path.iterdir())):
        return
    if path.is_dir() == is_file:
        kind, needed = ("file", "folder") if path.is_file() else ("folder", "file")
        raise UsageError(f"output.output {path} is a {kind}, and this export is a {needed}: give another --output")
    if foreign := _foreign(path):
        raise UsageError(f"{path} holds {foreign}, which no export writes: give a new folder, --output {path / name}")
    if not overwrite:
        raise UsageError(f"{path} exists: --overwrite replaces it, another --output keeps it")


def _foreign(path: Path) -> str | None:
    """A file or folder inside `path` that no export writes; None if there is none."""
    if path.is_file():
        return None
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    names = {entry.name for entry in path.iterdir()}
    if "model_index.json" in names:
        own = {entry.name for entry in path.iterdir() if entry.is_dir()} | {"model_index.json"}
    else:
        own = adapter if adapter & names else {"unet"}
    return min(names - own, default=None)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file or folder there replaces `path` at the end, unless something is
    raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    for left in (staged, old):  # from an export that was killed
        _remove(left)
    try:
        yield staged
        if path.is_dir():
            os.replace(path, old)
        os.replace(staged, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    finally:
        _remove(staged)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
