"""From a path to a source of rows: its layout is recognised without a flag, by names and columns."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.rows.archives import tar_rows
from diffusion_align.data.rows.archives.limits import PICTURE_SUFFIXES
from diffusion_align.data.rows.archives.samples import archive_layout
from diffusion_align.data.rows.archives.zip_members import zip_members
from diffusion_align.data.rows.archives.zip_rows import zip_samples
from diffusion_align.data.rows.known_layouts import (
    CAPTIONS,
    CHOSEN_REJECTED,
    PROMPT_LIST,
    Layout,
    layout_of,
    why_no_layout,
)
from diffusion_align.data.rows.listing import entries_of, files_of
from diffusion_align.data.rows.saved_datasets import saved_files
from diffusion_align.data.rows.splits import of_split
from diffusion_align.data.rows.tables import table_rows
from diffusion_align.data.rows.tables.columnar import COLUMNAR
from diffusion_align.data.rows.tables.text import PACKED, PLAIN, ReadOptions, TextFile, kind_of
from diffusion_align.data.rows.two_folders import TwoFolders, two_folders

UNFINISHED = "convert.json"
READABLE = (
    "parquet, .arrow, .jsonl, .json or .csv with pairs or rankings; a folder of them or with metadata.jsonl; "
    "webdataset .tar; a .zip; folders chosen and rejected; pictures with .txt beside them; or a .txt of prompts"
)
_CURES = {
    **dict.fromkeys((*PACKED, ".tgz", ".rar", ".7z", ".lz4"), "unpack it first"),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save it as CSV"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz"), "reading it can run code: save it as parquet"),
    **dict.fromkeys((".db", ".sqlite", ".mdb", ".feather", ".lmdb", ".h5", ".hdf5"), "save it as parquet"),
    **dict.fromkeys((f".{suffix}" for suffix in PICTURE_SUFFIXES), "give the folder that holds it"),
}
# Written beside data by this project and by others; they hold no rows.
_NOT_DATA = (
    "samples.json",
    "synth.json",
    "report.json",
    UNFINISHED,
    "dataset_infos.json",
    "dataset_info.json",
    "config.json",
)


@dataclass(frozen=True)
class DataSource:
    """A path whose layout is known.

    Attributes:
        unread: archive members passed over, by suffix, and hidden files. Archives are counted while they are read.
        folders: the two folders of pairs, if it is such a folder.
    """

    path: Path
    layout: Layout
    files: tuple[TextFile, ...]
    split: str
    unread: Counter[str] = field(default_factory=Counter)
    options: ReadOptions = PLAIN
    folders: TwoFolders | None = None


def is_picture(path: TextFile) -> bool:
    """Whether a file is a picture, by its name."""
    return path.suffix[1:].lower() in PICTURE_SUFFIXES


def recognise_preferences(
    path: str | os.PathLike[str], split: str, readable: str = READABLE, options: ReadOptions = PLAIN
) -> DataSource:
    """What a path holds; DataError if that compares no pictures, with what it is good for."""
    source = recognise(Path(path), split, readable, options)
    if not source.layout.compares:
        raise DataError(
            f"{path}: {source.layout.name}, which say nothing of what people prefer; data synth draws pictures of "
            f"prompts and ranks them; to train on, give {readable}"
        )
    return source


def recognise(path: Path, split: str = "train", readable: str = READABLE, options: ReadOptions = PLAIN) -> DataSource:
    """What `path`, a file or a folder, holds. Where files are named by split, only those of `split`.

    Raises:
        DataError: no such path, nothing known, or more than one thing; the names found, and what would be read.
    """
    if path.is_dir():
        return _folder(path, split, readable, options)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give {readable}")
    kind = kind_of(path)
    if kind == ".txt":
        return DataSource(path, PROMPT_LIST, (path,), split, options=options)
    if path.suffix.lower() == ".zip":
        return _zip(path, split, options)
    if path.suffix.lower() == ".tar" or table_rows.is_table(path):
        return DataSource(path, _layout_of(path, options), (path,), split, options=options)
    cure = f"; {_CURES[path.suffix.lower()]}" if path.suffix.lower() in _CURES else ""
    raise DataError(
        f"{path}: a {path.suffix or 'file without suffix'} is not a layout known here{cure}; give {readable}"
    )


def _layout_of(file: TextFile, options: ReadOptions) -> Layout:
    if isinstance(file, Path) and file.suffix.lower() == ".tar":
        return tar_rows.tar_layout(file)
    columns = table_rows.our_columns(file, options)
    layout = layout_of(columns)
    if layout is None or (layout is PROMPT_LIST and kind_of(file) in COLUMNAR):
        raise DataError(f"{file}: {why_no_layout(columns) if columns else 'holds no rows; is this the right file?'}")
    return layout


def _folder(folder: Path, split: str, readable: str, options: ReadOptions) -> DataSource:
    _require_finished(folder)
    saved = saved_files(folder, split)
    if saved is not None:
        return _one_layout(folder, list(saved), split, options)
    passed: Counter[str] = Counter()
    every = files_of(folder, passed)
    ways = (_known_files, _known_folder, _zip_in)
    source = next((found for way in ways if (found := way(folder, every, split, options)) is not None), None)
    if source is not None:
        source.unread.update(passed)
        return source
    if (folder / split).is_dir():
        return replace(_folder(folder / split, split, readable, options), path=folder)
    for file in every:
        if file.parent == folder and table_rows.is_table(file) and file.name not in _NOT_DATA:
            table_rows.our_columns(file, options)  # if it cannot be read, its reason is the better answer
    found = ", ".join(path.name for path in entries_of(folder)[:5]) or "nothing"
    hidden = f" and {sum(passed.values())} hidden, which are left out" if passed else ""
    raise DataError(f"{folder}: holds no preference data known here (found {found}{hidden}); give {readable}")


def _known_files(folder: Path, every: list[Path], split: str, options: ReadOptions) -> DataSource | None:
    """Metadata of datasets' image folder, or files of one kind; None if there are none."""
    metadata = [file for name in ("metadata.jsonl", "metadata.csv") for file in every
                if file.parent == folder and file.name.lower() == name]  # fmt: skip
    if metadata and two_folders(folder) is not None and not _compares(metadata[0], options):
        return None  # the prompts of pairs in two folders
    of_kind = [[file for file in every if file.suffix.lower() == suffix] for suffix in (".parquet", ".tar")]
    kinds = [kind for kind in (metadata[:1], metadata[1:], *of_kind) if kind]
    if len(kinds) > 1:
        raise DataError(f"{folder}: holds both {kinds[0][0].name} and {kinds[1][0].name}; name the file that is meant")
    if metadata:
        return DataSource(folder, _layout_of(metadata[0], options), tuple(metadata), split, options=options)
    # Arrow files beside others are most likely a cache of `datasets`.
    arrow = [file for file in every if file.suffix.lower() == ".arrow" and not file.name.startswith("cache-")]
    files = of_split(folder, kinds[0] if kinds else arrow, split)
    return _one_layout(folder, files, split, options) if files else None


def _zip_in(folder: Path, every: list[Path], split: str, options: ReadOptions) -> DataSource | None:
    """The zip archive of a folder that holds nothing else that is known; None if there is none."""
    files = of_split(folder, [file for file in every if file.suffix.lower() == ".zip"], split)
    if len(files) > 1:
        raise DataError(f"{folder}: holds {files[0].name} and {files[1].name}; name the file that is meant")
    return replace(_zip(files[0], split, options), path=folder) if files else None


def _known_folder(folder: Path, every: list[Path], split: str, options: ReadOptions) -> DataSource | None:
    """One list, pairs in two folders, or pictures with captions; None if there is none of them."""
    tables = [file for file in every if file.parent == folder and table_rows.is_table(file)]
    tables = [file for file in tables if file.name not in _NOT_DATA and _known(file, options) is not None]
    comparing = [file for file in tables if _compares(file, options)]
    sides = two_folders(folder)
    if sides is not None and not comparing:
        return DataSource(folder, CHOSEN_REJECTED, sides.pictures(), split, options=options, folders=sides)
    lists = comparing or [file for file in tables if kind_of(file) in table_rows.JSON]
    pictures = [path for path in every if is_picture(path)]
    if not lists and any(table_rows.text_beside(path) for path in pictures):
        return DataSource(folder, CAPTIONS, tuple(pictures), split, options=options)
    lists = of_split(folder, lists or tables, split) if lists or tables else []
    if len(lists) > 1:
        raise DataError(f"{folder}: holds {lists[0].name} and {lists[1].name}; name the file that is meant")
    return DataSource(folder, _layout_of(lists[0], options), tuple(lists), split, options=options) if lists else None


def _zip(file: Path, split: str, options: ReadOptions) -> DataSource:
    """A zip of a list with its pictures, or of pictures with texts."""
    unread: Counter[str] = Counter()
    members = [member for member in zip_members(file, unread) if not isinstance(member, BadRow)]
    stems = {member.path.rpartition(".")[0] for member in members if is_picture(member)}
    tables = [m for m in members if table_rows.is_table(m) and m.path.rpartition(".")[0] not in stems]
    tables = [m for m in tables if m.name not in _NOT_DATA and _known(m, options) is not None]
    tables = [m for m in tables if _compares(m, options)] or tables
    if tables:
        tables = of_split(file, tables, split)
        if len(tables) > 1:
            raise DataError(
                f"{file}: holds {tables[0].path} and {tables[1].path}; unzip it, and name the file that is meant"
            )
        return DataSource(file, _layout_of(tables[0], options), tuple(tables), split, unread, options)
    layout = archive_layout(file, zip_samples(file, unread), unread)
    return DataSource(file, layout, (file,), split, options=options)


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


def _known(file: TextFile, options: ReadOptions) -> Layout | None:
    try:
        return layout_of(table_rows.our_columns(file, options))
    except DataError:
        return None


def _compares(file: TextFile, options: ReadOptions) -> bool:
    layout = _known(file, options)
    return layout is not None and layout.compares


def _one_layout(folder: Path, files: list[Path], split: str, options: ReadOptions) -> DataSource:
    layouts = {file: _layout_of(file, options) for file in files}
    first = files[0]
    other = next((file for file in files if layouts[file] is not layouts[first]), None)
    if other is not None:
        a, b = sorted((first, other), key=lambda file: layouts[file].holds, reverse=True)
        held = [f"{layouts[file].holds} ({file.name})" for file in (a, b)]
        raise DataError(f"{folder}: holds {held[0]} and {held[1]}; name the file to read")
    return DataSource(folder, layouts[first], tuple(files), split, options=options)
