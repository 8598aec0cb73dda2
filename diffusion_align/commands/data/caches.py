"""`cache ls` and `cache rm`: the encoded pictures on disk, and their removal. One that a process uses stays."""

from __future__ import annotations

import time
from pathlib import Path

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.stored_caches import StoredCache, caches_in, is_in_use, remove, remove_oldest
from diffusion_align.options.cache import CacheLs, CacheRm
from diffusion_align.system.printable import printable

_PLACES = ("encoded", "cache")  # in a --cache_dir, in a run folder


def cache_ls(options: CacheLs) -> int:
    """List the caches, the one that was not used for longest first."""
    folder = caches_folder(options.folder or "")
    found = caches_in(folder)
    for cache in found:
        print(_described(cache) + ("  in use" if is_in_use(cache.home) else ""))
    print(f"{len(found)} caches, {_gigabytes(sum(cache.size for cache in found))}, in {printable(str(folder))}")
    return 0


def cache_rm(options: CacheRm) -> int:
    """Remove caches.

    Raises:
        DataError: a key of none or of several, or what is to be removed is in use; the others are removed.
    """
    folder = caches_folder(options.folder or "")
    if options.limit_gb is not None:
        for cache in remove_oldest(folder, int(options.limit_gb * 1e9)):
            print(f"removed {_described(cache)}")
    else:
        found = caches_in(folder)
        wanted = found if options.everything else [_named(folder, found, key) for key in options.key]
        used = [cache for cache in dict.fromkeys(wanted) if not _removed(cache)]
        if used:
            raise DataError(
                f"{used[0].home}: a process uses it, so it stays (and {len(used) - 1} others); end the run, or wait"
            )
    left = caches_in(folder)
    print(f"{len(left)} caches, {_gigabytes(sum(cache.size for cache in left))}, are left in {printable(str(folder))}")
    return 0


def caches_folder(name: str) -> Path:
    """The folder of the caches of a --cache_dir or of a run, or this folder itself. DataError if it does not exist."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a --cache_dir, a run folder, or the folder of the caches")
    return next((folder / place for place in _PLACES if (folder / place).is_dir()), folder)


def _removed(cache: StoredCache) -> bool:
    gone = remove(cache.home)
    if gone:
        print(f"removed {_described(cache)}")
    return gone


def _named(folder: Path, found: list[StoredCache], key: str) -> StoredCache:
    fits = [cache for cache in found if cache.home.name.startswith(key)]
    if len(fits) != 1:
        has = ", ".join(cache.home.name for cache in fits or found) or "none"
        what = f"{len(fits)} caches begin with" if fits else "there is no cache"
        raise DataError(f"{folder}: {what} {key!r}; it has {has}")
    return fits[0]


def _described(cache: StoredCache) -> str:
    """One line: key, size, last use, what it holds."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(cache.used))
    holds = "not finished" if cache.pairs is None else f"{cache.pairs:,} pairs or rankings at {cache.resolution}"
    return f"{cache.home.name}  {_gigabytes(cache.size):>9}  used {when}  {holds}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
