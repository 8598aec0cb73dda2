"""Files on disk: digests of their content, writes that appear complete or not at all, and the room that is left."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_align.data.bad_rows import DataError

_EDGE = 64 * 1024


def digest(data: bytes) -> str:
    """32 hex digits of the blake2b of some bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digest(file: Path) -> str:
    """A digest of a file that is cheap for large files: of its size and its first and last 64 KiB.

    It does not depend on the file's name, place or time, so a copied data set keeps its caches. It misses an edit in
    the middle of a large file that leaves the size alone.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(_EDGE)
        stream.seek(max(_EDGE, size - _EDGE))
        return digest(str(size).encode() + head + stream.read(_EDGE))


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file there replaces `path` at the end, unless something is raised."""
    staged = path.with_name(f".tmp-{path.name}")
    yield staged
    os.replace(staged, path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees either the old content or the new."""
    with replacing(path) as staged:
        staged.write_bytes(data)


class NoRoom(DataError):
    """The disk has less room than the files will take."""


def require_room(folder: Path, size: int) -> None:
    """Raise NoRoom unless the disk of `folder` has room for `size` bytes of tensors, of which some may exist."""
    size -= sum(_size(path) for path in folder.glob("*.safetensors"))
    disk = shutil.disk_usage(folder)
    # Some network file systems report 0 of 0.
    if disk.total and size > disk.free:
        raise NoRoom(
            f"{folder}: encoding takes up to {size / 1e9:.3g} GB, and the disk has {disk.free / 1e9:.3g} GB; "
            "free some, or delete caches of earlier runs beside it"
        )


def _size(path: Path) -> int:
    """Bytes of a file, 0 if it is gone: another rank may have renamed it since the folder was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
