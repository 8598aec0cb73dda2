"""The options of `data inspect`, `data check` and `data convert`."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass

from .names import UsageError
from .schema import option

PATH = "a file or folder in any layout of docs/data.md; the layout is recognised without a flag"
SPLIT = "split to read, if files are named by split (train-00000.parquet, test.json)"
MAX_BAD = "largest fraction of bad rows; these are left out and listed; with more, the command fails"


@dataclass(frozen=True)
class DataInspect:
    # fmt: off
    path: str | None = option(None, "data", PATH, path="in", one_of="source")
    dataset_name: str | None = option(None, "data", "instead of a path: tiny, or a data set on the hub, which is downloaded", path="name", one_of="source")
    split: str = option("train", "data", SPLIT, aliases=("dataset_split_name",))
    # fmt: on


@dataclass(frozen=True)
class DataCheck:
    # fmt: off
    path: str | None = option(None, "data", PATH, path="in")
    split: str = option("train", "data", SPLIT, aliases=("dataset_split_name",))
    max_bad_fraction: float = option(0.01, "data", MAX_BAD, at_least=0, at_most=1)

    pretrained_model_name_or_path: str | None = option(None, "model", "a model folder, or tiny: also count the captions that are longer than its text encoder reads", aliases=("model",), path="name")

    bad_rows: str = option("bad_rows.jsonl", "output", "file for the bad rows and their reasons", path="file")
    # fmt: on


@dataclass(frozen=True)
class DataConvert:
    # fmt: off
    path: str | None = option(None, "data", PATH, path="in")
    split: str = option("train", "data", SPLIT, aliases=("dataset_split_name",))
    max_bad_fraction: float = option(0.01, "data", MAX_BAD, at_least=0, at_most=1)

    out: str | None = option(None, "output", "folder for the shards", aliases=("output_dir",), path="folder")
    to: str = option("rankings", "output", "rankings: all pictures of a row together; pairs: one row for each pair", choices=("rankings", "pairs"))
    rows_per_shard: int = option(4096, "output", "source rows per file; a killed conversion loses at most one file", at_least=1)
    # fmt: on


def check_data(options: DataInspect | DataCheck | DataConvert) -> None:
    """Check the options together.

    Raises:
        UsageError: no path, or nowhere to convert to.
    """
    by_name = options.dataset_name if isinstance(options, DataInspect) else None
    if options.path is not None and by_name is not None:
        raise UsageError("two sources of data: give a path or --dataset_name, not both")
    if options.path is None and by_name is None:
        verb = {DataInspect: "inspect", DataCheck: "check", DataConvert: "convert"}[type(options)]
        raise UsageError(f"which data? diffusion-align data {verb} PATH")
    if isinstance(options, DataConvert) and options.out is None:
        raise UsageError("where to? --out FOLDER")
