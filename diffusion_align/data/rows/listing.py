"""The files of a folder that are data. What systems and editors leave beside them is passed over and counted."""

import os
from collections import Counter
from pathlib import Path

HIDDEN = "hidden"
_SIDE = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin", "lost+found",
     "system volume information")
)  # fmt: skip


def is_side(name: str) -> bool:
    """Whether a file or folder is hidden, or made by a system and not by a person: ._0.png, .DS_Store, Thumbs.db."""
    return name.startswith(".") or name.casefold() in _SIDE


def is_side_path(path: str) -> bool:
    """Whether a name in an archive is hidden, or lies in a hidden folder. "." and ".." are not hidden."""
    return any(is_side(part) for part in path.replace("\\", "/").split("/") if part not in (".", ".."))


def files_of(folder: Path, passed: Counter[str] | None = None) -> list[Path]:
    """All files under a folder, sorted. Hidden files and folders, and links to folders, are left out; the hidden ones
    are counted in `passed`."""
    found, hidden = [], 0
    for place, folders, names in os.walk(folder):
        kept = [name for name in folders if not is_side(name)]
        hidden += len(folders) - len(kept)
        folders[:] = kept
        files = [name for name in names if not is_side(name)]
        hidden += len(names) - len(files)
        found += [Path(place, name) for name in files]
    if passed is not None and hidden:
        passed[HIDDEN] += hidden
    return sorted(found)


def entries_of(folder: Path) -> list[Path]:
    """The files and folders directly in a folder, sorted, without the hidden ones; none if it is no folder."""
    return sorted(path for path in folder.iterdir() if not is_side(path.name)) if folder.is_dir() else []
