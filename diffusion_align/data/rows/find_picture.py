"""The file that a name in a list means: as it stands, or with other slashes, letters or Unicode forms if only that
exists. Nothing outside the folder is ever taken."""

import os
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.rows.archives.zip_members import ZipFolder, ZipMember

_NAMES_SHOWN = 3


def find_picture(root: Path | ZipFolder, name: Any, what: str) -> Path | ZipMember | str:
    """The file that `what` names under a root, or why there is none. DataError for a path that leaves the root."""
    if not isinstance(name, str) or not name:
        return f"{what!r} is {type(name).__name__}, not a file name"
    try:
        if isinstance(root, ZipFolder):
            return _in_zip(root, name)
        path = inside(root, name)
        return path if path.is_file() else _like(root, name)
    except DataError:
        raise
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, a name too long, a loop of links
        return f"picture {name[:80]!r} cannot be looked up ({error})"


def inside(root: Path, name: str) -> Path:
    """The path that `name` means under `root`, symbolic links resolved; DataError if it leaves the root.

    A download of the hub's client is a folder of links to the blobs beside it: these are inside.
    """
    path = (root / name).resolve()
    if path.is_relative_to(_resolved(root)):
        return path
    blobs = _blobs(root)
    if blobs is not None and path.parent == blobs and ".." not in Path(name).parts:
        return root / name
    if any(part.is_symlink() for part in (root / name, *(root / name).parents[: len(Path(name).parts) - 1])):
        raise DataError(
            f"{root}: {name!r:.200} is a link that leads outside; put the file itself beside the file that "
            "lists it (`cp -rL FOLDER COPY` copies a folder with files in place of links)"
        )
    raise DataError(f"{root}: path {name!r:.200} leads outside; put the pictures beside the file that lists them")


def normal(name: str) -> str:
    """A name as it is compared: one Unicode form, no case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _like(root: Path, name: str) -> Path | str:
    """The one file whose path differs only by slashes, by Unicode form, by case or by spaces around it."""
    absent = f"picture {name[:200]!r} does not exist in {root}"
    if name.startswith(("http://", "https://", "s3://", "gs://", "hf://")):
        return f"{absent}: it is an address, so download the picture and give the name of its file"
    if name.startswith("data:"):
        return f"picture {name[:40]!r} is written as text: save it as a file and give its name"
    place, parts = root, name.strip().replace("\\", "/").split("/")
    if ".." in parts:
        path = inside(root, "/".join(parts))
        return path if path.is_file() else absent
    if parts[0][1:2] == ":":
        return f"{absent}; it is a path of another machine, so make it relative to the list"
    for part in parts:
        if part in ("", "."):
            continue
        if os.path.lexists(place / part):
            place /= part
            continue
        found = _listed(place, place.stat().st_mtime_ns).get(normal(part), ()) if place.is_dir() else ()
        if len(found) > 1:
            return f"{absent}, but {', '.join(map(repr, found[:_NAMES_SHOWN]))} do: give one name exactly"
        if not found:
            return absent
        place /= found[0]
    path = inside(root, place.relative_to(root).as_posix())
    return path if path.is_file() else absent


def _in_zip(root: ZipFolder, name: str) -> ZipMember | str:
    prefix = f"{root.path}/" if root.path else ""
    parts = [part for part in f"{prefix}{name.strip()}".replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts or name.startswith("/"):
        raise DataError(f"{root}: path {name!r:.200} leads outside; put the pictures beside the file that lists them")
    path, names = "/".join(parts), root.names()
    if path in names:
        return names[path]
    found = [member for key, member in names.items() if normal(key) == normal(path)]
    return found[0] if len(found) == 1 else f"picture {name[:200]!r} does not exist in {root}"


@lru_cache(maxsize=64)
def _listed(folder: Path, changed: int) -> dict[str, tuple[str, ...]]:
    """The names in a folder, by what they are compared by."""
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(os.listdir(folder)):
        found[normal(name)] = (*found.get(normal(name), ()), name)
    return found


# Called for every picture of a list, always with the same few folders.
@lru_cache(maxsize=64)
def _resolved(root: Path) -> Path:
    return root.resolve()


@lru_cache(maxsize=64)
def _blobs(root: Path) -> Path | None:
    """The folder of files that a snapshot of the hub's client links to; None if `root` is in no snapshot."""
    for folder in (root.absolute(), *root.absolute().parents):
        if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
            return (folder.parent.parent / "blobs").resolve()
    return None
