"""The options of `data inspect`, `data check` and `data convert`."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass

from .names import UsageError
from .schema import option

PATH = "a file or folder in any layout of docs/data.md; the layout is recognised without a flag"
SPLIT = "split to read, if files are named by split (train-00000.parquet, test.json)"
MAX_BAD = "largest fraction of bad rows; these are left out and listed; with more, the command fails"
ENCODING = "encoding of texts and tables that have no byte order mark, such as cp1252 or gb18030 (default: UTF-8)"
COLUMNS = "what the data calls a column, as OURS=THEIRS, such as chosen=winner_path; may be repeated (default: usual names are known)"


def encoding_fault(name: str) -> str | None:
    """What is wrong with the name of an encoding; None if texts can be read in it."""
    try:
        "".encode(name)
    except (LookupError, ValueError):
        return "is no encoding of text that Python knows, such as cp1252, utf-16, gb18030 or shift_jis"
    return None


def columns_fault(pairs: tuple[str, ...]) -> str | None:
    """What is wrong with the form of a mapping of columns; None if nothing is."""
    parts = [pair.partition("=") for pair in pairs]
    bad = next((pair for pair, (ours, _, theirs) in zip(pairs, parts, strict=True) if not ours or not theirs), None)
    if bad is not None:
        return f"{bad!r} is not OURS=THEIRS, such as chosen=winner_path"
    names = [ours for ours, _, _ in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    return None if twice is None else f"says twice what {twice} is"


@dataclass(frozen=True)
class DataInspect:
    # fmt: off
    path: str | None = option(None, "data", PATH, path="in", one_of="source")
    dataset_name: str | None = option(None, "data", "instead of a path: tiny, or a data set on the hub, which is downloaded", path="name", one_of="source")
    split: str = option("train", "data", SPLIT, aliases=("dataset_split_name",))
    columns: tuple[str, ...] = option((), "data", COLUMNS, fault=columns_fault)
    encoding: str | None = option(None, "data", ENCODING, fault=encoding_fault)
    # fmt: on


@dataclass(frozen=True)
class DataCheck:
    # fmt: off
    path: str | None = option(None, "data", PATH, path="in")
    split: str = option("train", "data", SPLIT, aliases=("dataset_split_name",))
    columns: tuple[str, ...] = option((), "data", COLUMNS, fault=columns_fault)
    encoding: str | None = option(None, "data", ENCODING, fault=encoding_fault)
    max_bad_fraction: float = option(0.01, "data", MAX_BAD, at_least=0, at_most=1)

    pretrained_model_name_or_path: str | None = option(None, "model", "a model folder, or tiny: also count the captions that are longer than its text encoder reads", aliases=("model",), path="name")

    bad_rows: str = option("bad_rows.jsonl", "output", "file for the bad rows and their reasons", path="file")
    # fmt: on


@dataclass(frozen=True)
class DataConvert:
    # fmt: off
    path: str | None = option(None, "data", PATH, path="in")
    split: str = option("train", "data", SPLIT, aliases=("dataset_split_name",))
    columns: tuple[str, ...] = option((), "data", COLUMNS, fault=columns_fault)
    encoding: str | None = option(None, "data", ENCODING, fault=encoding_fault)
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
