"""Caches on disk: which there are, which processes use, and which are removed to keep within a limit.

A cache is a folder of `cache.py`. The file .in-use in it is locked by every process that uses the cache, for as long as
it does; its time is when the cache was last used. A cache is removed only under a lock of its own, so never while a
process uses it. Any cache can be made again from its pictures.
"""

import fcntl
import json
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.data.bad_rows import DataError

IN_USE = ".in-use"
_KEY = re.compile(r"[0-9a-f]{16}")
_REMOVED = ".removed-"


class OverLimit(DataError):
    """The caches of a folder would take more than their limit."""


@dataclass(frozen=True)
class StoredCache:
    """A cache on disk.

    Attributes:
        size: bytes on disk.
        used: when it was last used, in seconds since 1970.
        pairs: how many pairs or rankings it holds; None if its encoding has not finished.
        resolution: of its pictures; None if its encoding has not finished.
    """

    home: Path
    size: int
    used: float
    pairs: int | None
    resolution: int | str | None


class Hold:
    """Keeps a cache from being removed, until it is closed or nobody refers to it."""

    def __init__(self, descriptor: int):
        self.close = weakref.finalize(self, os.close, descriptor)


def hold(home: Path) -> Hold | None:
    """Make the folder of a cache, and keep it from being removed.

    None if the folder cannot be written to: nobody removes a cache there.
    """
    while True:
        home.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(home / IN_USE, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        held = Hold(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            # Otherwise the folder was removed before the lock was taken.
            if os.path.samestat(os.fstat(descriptor), os.stat(home / IN_USE)):
                os.utime(home / IN_USE)
                return held
        held.close()


def is_in_use(home: Path) -> bool:
    """Whether a process uses a cache now."""
    try:
        with (home / IN_USE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def caches_in(folder: Path) -> list[StoredCache]:
    """The caches of a folder, the one that was not used for longest first."""
    places = [path for path in folder.iterdir() if _KEY.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(map(_stored, filter(Path.is_dir, places)), key=lambda cache: (cache.used, cache.home.name))


def _stored(home: Path) -> StoredCache:
    size, newest, pairs, resolution = 0, 0.0, None, None
    for path in home.iterdir():
        with suppress(FileNotFoundError):  # a process may rename files meanwhile
            facts = path.stat()
            size += facts.st_size
            newest = max(newest, facts.st_mtime)
    with suppress(FileNotFoundError):
        newest = (home / IN_USE).stat().st_mtime
    with suppress(OSError, ValueError, KeyError, TypeError):
        manifest = json.loads((home / "manifest.json").read_text(encoding="utf-8"))
        names = manifest["pair_shards"]
        pairs = sum(len(json.loads((home / f"{name}.json").read_text(encoding="utf-8"))["kept"]) for name in names)
        resolution = manifest["identity"]["resolution"]
    return StoredCache(home, size, newest, pairs, resolution)


def remove(home: Path) -> bool:
    """Remove a cache unless a process uses it; whether it is gone."""
    try:
        file = (home / IN_USE).open("a+b")
    except FileNotFoundError:
        return True
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Renamed first, so that a removal that is killed leaves no half of a cache behind.
        gone = home.with_name(f"{_REMOVED}{home.name}-{os.getpid()}")
        try:
            os.replace(home, gone)
        except FileNotFoundError:
            return True
    shutil.rmtree(gone, ignore_errors=True)
    return True


def remove_oldest(folder: Path, limit: int, *, keep: Path | None = None, room: int = 0) -> Iterator[StoredCache]:
    """Remove the caches that were not used for longest until the others and `room` bytes take at most `limit` bytes;
    yields each that was removed. `keep` is left alone, and its size does not count."""
    for leftover in folder.glob(f"{_REMOVED}*") if folder.is_dir() else ():
        shutil.rmtree(leftover, ignore_errors=True)
    found = [cache for cache in caches_in(folder) if cache.home != keep]
    total = sum(cache.size for cache in found) + room
    for cache in found:
        if total <= limit:
            return
        if remove(cache.home):
            total -= cache.size
            yield cache
    if total > limit and found:
        used = [cache for cache in found if cache.home.is_dir()]
        raise OverLimit(
            f"{folder}: with {room / 1e9:.3g} GB to come, caches take {total / 1e9:.3g} GB, over the limit of "
            f"{limit / 1e9:.3g} GB, and the {len(used)} that are left are in use"
        )


def make_room(home: Path, size: int, limit: int) -> list[StoredCache]:
    """Remove old caches beside `home` until `size` bytes more keep within `limit` bytes; those that were removed.

    Raises:
        OverLimit: the size alone is over the limit, or what is left is in use.
    """
    if size > limit:
        raise OverLimit(
            f"{home}: encoding takes up to {size / 1e9:.3g} GB, over the limit of {limit / 1e9:.3g} GB on all caches"
        )
    return list(remove_oldest(home.parent, limit, keep=home, room=size))
