"""From a path to a source of rows: its layout is recognised without a flag, by names and columns."""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.rows import table_rows, tar_rows
from diffusion_align.data.rows.known_layouts import CAPTIONS, PROMPT_LIST, Layout, layout_of, why_no_layout

SPLITS = ("train", "validation", "valid", "val", "test", "dev")
UNFINISHED = "convert.json"
READABLE = (
    "parquet, .jsonl, .json or .csv with pairs or rankings; a folder of them or with metadata.jsonl; webdataset .tar; "
    "pictures with .txt beside them; or a .txt of prompts"
)
# Written beside data by this project and by others; they hold no rows.
_NOT_DATA = ("samples.json", "synth.json", "report.json", UNFINISHED, "dataset_infos.json", "config.json")


@dataclass(frozen=True)
class DataSource:
    """A path whose layout is known. While it is read, `unread` counts archive members passed over, by suffix."""

    path: Path
    layout: Layout
    files: tuple[Path, ...]
    split: str
    unread: Counter[str] = field(default_factory=Counter)


def is_picture(path: Path) -> bool:
    return path.suffix[1:].lower() in tar_rows.PICTURE_SUFFIXES


def recognise_preferences(path: str | os.PathLike[str], split: str, readable: str = READABLE) -> DataSource:
    """What a path holds; DataError if that compares no pictures, with what it is good for."""
    source = recognise(Path(path), split, readable)
    if not source.layout.compares:
        raise DataError(
            f"{path}: {source.layout.name}, which say nothing of what people prefer; data synth draws pictures of "
            f"prompts and ranks them; to train on, give {readable}"
        )
    return source


def recognise(path: Path, split: str = "train", readable: str = READABLE) -> DataSource:
    """What `path`, a file or a folder, holds. Where files are named by split, only those of `split`.

    Raises:
        DataError: no such path, nothing known, or more than one thing; the names found, and what would be read.
    """
    if path.is_dir():
        return _folder(path, split, readable)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give {readable}")
    if path.suffix == ".txt":
        return DataSource(path, PROMPT_LIST, (path,), split)
    if path.suffix == ".tar" or path.suffix in table_rows.SUFFIXES:
        return DataSource(path, _layout_of(path), (path,), split)
    packed = "; unpack it first" if path.suffix in (".gz", ".tgz", ".zip", ".zst", ".xz", ".bz2") else ""
    raise DataError(
        f"{path}: a {path.suffix or 'file without suffix'} is not a layout known here{packed}; give {readable}"
    )


def _layout_of(file: Path) -> Layout:
    if file.suffix == ".tar":
        return tar_rows.tar_layout(file)
    columns = table_rows.columns_of(file)
    layout = layout_of(columns)
    if layout is None or (layout is PROMPT_LIST and file.suffix == ".parquet"):
        raise DataError(f"{file}: {why_no_layout(columns) if columns else 'holds no rows; is this the right file?'}")
    return layout


def _folder(folder: Path, split: str, readable: str) -> DataSource:
    _require_finished(folder)
    metadata = [file for file in (folder / "metadata.jsonl", folder / "metadata.csv") if file.is_file()]
    parquet, tars = (sorted(folder.rglob(f"*.{suffix}")) for suffix in ("parquet", "tar"))
    kinds = [kind for kind in (metadata[:1], metadata[1:], parquet, tars) if kind]
    if len(kinds) > 1:
        raise DataError(f"{folder}: holds both {kinds[0][0].name} and {kinds[1][0].name}; name the file that is meant")
    if metadata:
        return DataSource(folder, _layout_of(metadata[0]), tuple(metadata), split)
    if kinds:
        return _one_layout(folder, _of_split(folder, kinds[0], split), split)
    lists = [file for file in sorted(folder.glob("*.json*")) if file.suffix in table_rows.SUFFIXES]
    lists = [file for file in lists if file.name not in _NOT_DATA and _is_known(file)]
    if lists:
        lists = _of_split(folder, lists, split)
        if len(lists) > 1:
            raise DataError(f"{folder}: holds {lists[0].name} and {lists[1].name}; name the file that is meant")
        return DataSource(folder, _layout_of(lists[0]), tuple(lists), split)
    pictures = sorted(filter(is_picture, folder.rglob("*")))
    if any(path.with_suffix(".txt").is_file() for path in pictures):
        return DataSource(folder, CAPTIONS, tuple(pictures), split)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise DataError(f"{folder}: holds no preference data known here (found {found}); give {readable}")


def _require_finished(folder: Path) -> None:
    state = folder / UNFINISHED
    if not state.is_file():
        return
    try:
        known = json.loads(state.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{state}: is not JSON ({str(error)[:200]}); delete it, or fetch the data again") from error
    if not isinstance(known, dict) or not known.get("complete", True):
        raise DataError(f"{folder}: data convert has not finished; the same command goes on")


def _is_known(file: Path) -> bool:
    try:
        return layout_of(table_rows.columns_of(file)) is not None
    except DataError:
        return False


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files of a split where some are named by one: train-00000-of-00002.parquet, metadata-test.parquet."""
    names = {file: next((w for w in re.split(r"[-_.]", file.stem) if w in SPLITS), "") for file in files}
    if not any(names.values()):
        return files
    chosen = [file for file in files if names[file] == split]
    if not chosen:
        found = ", ".join(sorted(set(names.values()) - {""}))
        raise DataError(f"{folder}: holds no split {split!r}, only {found}")
    return chosen


def _one_layout(folder: Path, files: list[Path], split: str) -> DataSource:
    layouts = {file: _layout_of(file) for file in files}
    first = files[0]
    other = next((file for file in files if layouts[file] is not layouts[first]), None)
    if other is not None:
        a, b = sorted((first, other), key=lambda file: layouts[file].holds, reverse=True)
        held = [f"{layouts[file].holds} ({file.name})" for file in (a, b)]
        raise DataError(f"{folder}: holds {held[0]} and {held[1]}; name the file to read")
    return DataSource(folder, layouts[first], tuple(files), split)
