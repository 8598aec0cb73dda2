"""The options of `cache ls` and `cache rm`."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass

from .names import UsageError
from .schema import option

FOLDER = "a --cache_dir, a run folder, or the folder of the caches itself"


@dataclass(frozen=True)
class CacheLs:
    # fmt: off
    folder: str | None = option(None, "cache", FOLDER, path="in")
    # fmt: on


@dataclass(frozen=True)
class CacheRm:
    # fmt: off
    folder: str | None = option(None, "cache", FOLDER, path="in")
    key: tuple[str, ...] = option((), "cache", "the key of a cache to remove, or its beginning, as `cache ls` prints it; may be repeated")
    everything: bool = option(False, "cache", "remove all caches of the folder", aliases=("all",))
    limit_gb: float | None = option(None, "cache", "remove those that were not used for longest, until the others take at most this many GB", aliases=("cache_limit_gb",), at_least=0)
    # fmt: on


def check_cache_ls(options: CacheLs | CacheRm) -> None:
    """Raise UsageError if there is no folder."""
    if options.folder is None:
        verb = "rm" if isinstance(options, CacheRm) else "ls"
        raise UsageError(f"which caches? diffusion-align cache {verb} FOLDER: {FOLDER}")


def check_cache_rm(options: CacheRm) -> None:
    """Raise UsageError unless it is said, in one way, what to remove."""
    check_cache_ls(options)
    ways = [bool(options.key), options.everything, options.limit_gb is not None]
    if sum(ways) != 1:
        raise UsageError("which of them? --key KEY (may be repeated), --limit_gb N, or --all; `cache ls` lists them")
