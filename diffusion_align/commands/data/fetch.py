"""Pairs and rankings on the hub, fetched as a training needs them; and what options say of files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.hub_sets import HubSet, stream_set
from diffusion_align.data.rows.tables.columns import unknown_column
from diffusion_align.data.rows.tables.text import PLAIN, ReadOptions
from diffusion_align.options import UsageError


def read_options(o: Any) -> ReadOptions:
    """What the options say of files that the files do not tell.

    Raises:
        UsageError: a column of ours that no layout has.
    """
    columns = {ours: theirs for ours, _, theirs in (pair.partition("=") for pair in o.columns)}
    if fault := unknown_column(columns):
        raise UsageError(f"--columns: {fault}")
    return ReadOptions(o.encoding or "", columns)


def fetch_pairs(
    name: str,
    split: str,
    cache_dir: str | None,
    *,
    config: str | None = None,
    most: int | None = None,
    options: ReadOptions = PLAIN,
) -> Path:
    """The folder of one split of a data set on the hub: its parquet files, downloaded; or a set of another format
    (or a configuration that is named), streamed into parquet files until it has `most` pairs; else all its files.

    Raises:
        FileNotFoundError: the download failed; the message has the hub's answer in one line and two remedies.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        found = None
        if config is None:
            patterns = [f"*{split}*.parquet"]
            found = Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns, cache_dir=cache_dir))
            if any(found.rglob("*.parquet")):
                return found
        under = Path(cache_dir) if cache_dir else Path(constants.HF_ASSETS_CACHE) / "diffusion_align"
        revision = found.name if found is not None and re.fullmatch("[0-9a-f]{40}", found.name) else None
        streamed = stream_set(HubSet(name, split, config, revision, most), under / "streamed", options)
        if streamed is None and config is not None:
            raise ValueError(f"configuration {config} has no pictures that are compared in its split {split}")
        return streamed or Path(snapshot_download(name, repo_type="dataset", cache_dir=cache_dir))
    except DataError:
        raise
    except Exception as error:  # the hub's client raises errors of its own, of its HTTP library and of the system
        answer = " ".join(str(error).split())[:200]
        cure = f"`hf download {name} --repo-type dataset` fetches it; or give pairs on this disk with --train_data_dir"
        raise FileNotFoundError(f"pairs {name}: no such path here, and the hub says: {answer}; {cure}") from error
