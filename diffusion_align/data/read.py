"""What a path holds, found out without a flag: its layout, its files, and every row as one kind of record."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusion_align.data import folders, samples, table_rows
from diffusion_align.data.known_layouts import CAPTIONS, IMAGE_REWARD_DB, PROMPT_LIST, Format
from diffusion_align.data.match import match, missing
from diffusion_align.data.raw_rows import BadRow, DataError
from diffusion_align.data.records import Record
from diffusion_align.data.rows import Row, RowError

SPLITS = ("train", "validation", "valid", "val", "test", "dev")
UNFINISHED = "convert.json"
LAYOUTS = (
    "parquet, .jsonl, .json or .csv with pairs or rankings; a folder of them or with metadata.jsonl; webdataset .tar; "
    "pictures with .txt beside them; or a .txt of prompts"
)
# Written beside data by this project and by others; they hold no rows.
_NOT_DATA = ("samples.json", "synth.json", "report.json", UNFINISHED, "dataset_infos.json", "config.json")


@dataclass(frozen=True)
class Source:
    """A path whose layout is known. While it is read, `unread` counts members of archives passed over, by suffix."""

    path: Path
    format: Format
    files: tuple[Path, ...]
    split: str
    unread: Counter[str] = field(default_factory=Counter)


def recognise(path: Path, split: str = "train", layouts: str = LAYOUTS) -> Source:
    """What `path`, a file or a folder, holds. Where files are named by split, only those of `split`.

    Raises:
        DataError: no such path, nothing known, or more than one thing; the names found, and what would be read.
    """
    if path.is_dir():
        return _folder(path, split, layouts)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give {layouts}")
    if path.suffix == ".txt":
        return Source(path, PROMPT_LIST, (path,), split)
    if path.suffix == ".tar" or path.suffix in table_rows.SUFFIXES:
        return Source(path, _format_of(path), (path,), split)
    packed = "; unpack it first" if path.suffix in (".gz", ".tgz", ".zip", ".zst", ".xz", ".bz2") else ""
    kind = path.suffix or "file without suffix"
    raise DataError(f"{path}: a {kind} is not a layout known here{packed}; give {layouts}")


def rows(source: Source) -> Iterator[Row | BadRow]:
    """Every row, one at a time, in the order of the files: what can be used, and what cannot with the reason.

    Raises:
        DataError: a file that cannot be read on, or a path that leads out of the data's folder.
    """
    for record in _records(source):
        if isinstance(record, BadRow):
            yield record
            continue
        try:
            row = source.format.row(record)
        except RowError as error:
            yield BadRow(record.id, str(error))
        else:
            yield row if row.source else replace(row, source=source.format.name)


def _records(source: Source) -> Iterator[BadRow | Record]:
    if source.format is CAPTIONS and source.path.is_dir() and source.files[0].suffix[1:].lower() in folders.PICTURES:
        yield from folders.captions(source.path, list(source.files))
        return
    for file in source.files:
        if file.suffix == ".tar":
            yield from samples.records(file, source.format, source.unread)
        elif file.suffix == ".txt":
            yield from folders.prompt_lines(file)
        else:
            # HPDv2's lists name pictures that lie in a folder of the split's name.
            near = ("", *(name for name in ("train", "test") if (file.parent / name).is_dir()))
            found = table_rows.records(file, source.format, near)
            yield from _by_prompt(found) if source.format is IMAGE_REWARD_DB else found


def _by_prompt(found: Iterable[BadRow | Record]) -> Iterator[BadRow | Record]:
    """ImageRewardDB's rows, a picture each, as one record a prompt_id, under the id of its first row.

    The rows of a prompt need not stand together, so this layout's small values are held in memory, not its pictures.
    """
    groups: dict[str, list[Record]] = {}
    for record in found:
        if isinstance(record, BadRow):
            yield record
        elif record.values.get("prompt_id") is None:
            yield BadRow(record.id, "'prompt_id' is missing")
        else:
            groups.setdefault(str(record.values["prompt_id"]), []).append(record)
    for group in groups.values():
        lists = {name: [record.values.get(name) for record in group] for name in ("image_path", "rank")}
        yield replace(group[0], values={**group[0].values, **lists})


def _format_of(file: Path) -> Format:
    if file.suffix == ".tar":
        return samples.format_of(file)
    columns = table_rows.columns_of(file)
    known = match(columns)
    if known is None or (known is PROMPT_LIST and file.suffix == ".parquet"):
        raise DataError(f"{file}: {missing(columns)}" if columns else f"{file}: holds no rows; is this the right file?")
    return known


def _folder(folder: Path, split: str, layouts: str) -> Source:
    _refuse_unfinished(folder)
    metadata = [file for file in (folder / "metadata.jsonl", folder / "metadata.csv") if file.is_file()]
    parquet, tars = (sorted(folder.rglob(f"*.{suffix}")) for suffix in ("parquet", "tar"))
    kinds = [kind for kind in (metadata[:1], metadata[1:], parquet, tars) if kind]
    if len(kinds) > 1:
        raise DataError(f"{folder}: holds both {kinds[0][0].name} and {kinds[1][0].name}; name the file that is meant")
    if metadata:
        return Source(folder, _format_of(metadata[0]), tuple(metadata), split)
    if kinds:
        return _one_layout(folder, _of_split(folder, kinds[0], split), split)
    lists = [file for file in sorted(folder.glob("*.json*")) if file.suffix in table_rows.SUFFIXES]
    lists = [file for file in lists if file.name not in _NOT_DATA and _is_known(file)]
    if lists:
        lists = _of_split(folder, lists, split)
        if len(lists) > 1:
            raise DataError(f"{folder}: holds {lists[0].name} and {lists[1].name}; name the file that is meant")
        return Source(folder, _format_of(lists[0]), tuple(lists), split)
    pictures = folders.captioned(folder)
    if pictures:
        return Source(folder, CAPTIONS, tuple(pictures), split)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise DataError(f"{folder}: holds no preference data known here (found {found}); give {layouts}")


def _refuse_unfinished(folder: Path) -> None:
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
        return match(table_rows.columns_of(file)) is not None
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


def _one_layout(folder: Path, files: list[Path], split: str) -> Source:
    formats = {file: _format_of(file) for file in files}
    first = files[0]
    other = next((file for file in files if formats[file] is not formats[first]), None)
    if other is not None:
        a, b = sorted((first, other), key=lambda file: formats[file].holds, reverse=True)
        said = [f"{formats[file].holds} ({file.name})" for file in (a, b)]
        raise DataError(f"{folder}: holds {said[0]} and {said[1]}; name the file to read")
    return Source(folder, formats[first], tuple(files), split)
