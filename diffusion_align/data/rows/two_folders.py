"""Pairs in two folders: chosen/07.png with rejected/07.png, and a prompt for each.

Prompts are texts beside the pictures (07.txt in either folder, or in prompts/), a table prompts.csv or metadata.jsonl
with file_name and prompt, or prompts.txt with one a line, in the order of the names.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.rows.archives.limits import PICTURE_SUFFIXES
from diffusion_align.data.rows.find_picture import normal
from diffusion_align.data.rows.known_layouts import CAPTIONS
from diffusion_align.data.rows.listing import entries_of, files_of
from diffusion_align.data.rows.raw_rows import RawRow
from diffusion_align.data.rows.tables.json_rows import text_lines
from diffusion_align.data.rows.tables.table_rows import is_table, our_columns, table_rows, text_beside, text_of
from diffusion_align.data.rows.tables.text import ReadOptions, kind_of, not_text

_SIDES = (
    ("chosen", "rejected"), ("winner", "loser"), ("winners", "losers"), ("win", "lose"), ("preferred", "dispreferred"),
    ("preferred", "rejected"), ("accepted", "rejected"), ("good", "bad"), ("better", "worse"),
)  # fmt: skip
_PROMPTS = ("prompts", "captions", "texts", "metadata")
_HOW = (
    "put 07.txt beside 07.png, or prompts.csv with file_name and prompt, or prompts.txt with one a line, in the folder"
)


@dataclass(frozen=True)
class TwoFolders:
    """A folder with one folder of the better pictures and one of the worse."""

    root: Path
    chosen: Path
    rejected: Path

    def pictures(self) -> tuple[Path, ...]:
        return tuple(path for side in (self.chosen, self.rejected) for path in _pictures(side))


def two_folders(root: Path) -> TwoFolders | None:
    """The two folders of a folder, by their names; None if it has none, or no picture in one of them."""
    named = {path.name.casefold(): path for path in entries_of(root) if path.is_dir()}
    for better, worse in _SIDES:
        if better in named and worse in named and _pictures(named[better]) and _pictures(named[worse]):
            return TwoFolders(root, named[better], named[worse])
    return None


def _pictures(folder: Path) -> list[Path]:
    return [path for path in files_of(folder) if path.suffix[1:].lower() in PICTURE_SUFFIXES]


def two_folder_rows(folders: TwoFolders, options: ReadOptions) -> Iterator[BadRow | RawRow]:
    """A row for each name, in the order of the names; a name without a partner or a prompt is a broken row.

    Raises:
        DataError: there are no prompts, or it is not known which belongs to which.
    """
    sides = _by_name(folders.chosen), _by_name(folders.rejected)
    names = sorted({*sides[0], *sides[1]})
    listed = _listed_prompts(folders, names, options)
    for number, name in enumerate(names):
        found = [side.get(name, []) for side in sides]
        where = f"{folders.root.name}:{name}"
        for paths, folder in zip(found, (folders.chosen, folders.rejected), strict=True):
            if len(paths) != 1:
                has = f"{len(paths)} pictures" if paths else "no picture"
                yield BadRow(where, f"has {has} of this name in {folder.name}")
                break
        else:
            better, worse = found[0][0], found[1][0]
            prompt = listed.get(name) if listed else _text(folders, name, better, worse, options)
            if isinstance(prompt, str):
                relative = {
                    k: p.relative_to(folders.root).as_posix() for k, p in (("chosen", better), ("rejected", worse))
                }
                yield RawRow(where, {"prompt": prompt, **relative}, better, number, root=folders.root)
            else:
                yield prompt if prompt is not None else BadRow(where, "has no prompt")


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """Pictures by their path in the folder without suffix, in one Unicode form."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in _pictures(folder):
        found[_key(path.relative_to(folder).as_posix())].append(path)
    return found


def _key(name: str) -> str:
    return normal(PurePosixPath(name.replace("\\", "/")).with_suffix("").as_posix())


def _listed_prompts(folders: TwoFolders, names: list[str], options: ReadOptions) -> Mapping[str, str | BadRow]:
    """Prompts by name, from a table or a list of lines in the root; empty if there is neither."""
    files = [
        path for path in entries_of(folders.root) if path.is_file() and path.name.split(".")[0].lower() in _PROMPTS
    ]
    tables = [file for file in files if is_table(file)]
    texts = [file for file in files if kind_of(file) == ".txt"]
    if len(tables) + len(texts) > 1:
        raise DataError(f"{folders.root}: holds {files[0].name} and {files[1].name}; remove the one that is not meant")
    if tables:
        return _from_table(folders, tables[0], options)
    if texts:
        return _from_lines(texts[0], names, options.encoding)
    beside = any(text_beside(path) is not None for path in folders.pictures())
    if not beside and _text_folder(folders.root) is None:
        raise DataError(
            f"{folders.root}: has pairs in {folders.chosen.name} and {folders.rejected.name}, and no prompts: {_HOW}"
        )
    return {}


def _from_table(folders: TwoFolders, file: Path, options: ReadOptions) -> dict[str, str | BadRow]:
    columns = our_columns(file, options)
    if not CAPTIONS.fits(columns):
        raise DataError(f"{file}: needs columns file_name and prompt; it has {', '.join(map(repr, columns)) or 'none'}")
    found: dict[str, str | BadRow] = {}
    for row in table_rows(file, CAPTIONS, options=options):
        if isinstance(row, BadRow):
            raise DataError(f"{file}: {row}")
        name = str(row.values.get("file_name"))
        first = PurePosixPath(name.replace("\\", "/")).parts[:1]
        within = (
            name[len(first[0]) + 1 :] if first and first[0] in (folders.chosen.name, folders.rejected.name) else name
        )
        key, prompt = _key(within), row.prompt()
        if found.setdefault(key, prompt) != prompt:
            raise DataError(f"{file}: gives two prompts for {within!r}; give one for each name")
    return found


def _from_lines(file: Path, names: list[str], encoding: str) -> dict[str, str | BadRow]:
    lines: dict[int, str | BadRow] = {}
    for number, line in text_lines(file, encoding):
        try:
            lines[number] = line.decode().strip()
        except UnicodeDecodeError as error:
            lines[number] = BadRow(f"{file.name}:{number}", not_text(error, line))
    last = max(lines, default=0)
    if last != len(names):
        raise DataError(f"{file}: has {last} lines for {len(names)} names of pictures; give one a name")
    if sorted(names, key=_natural) != names:
        raise DataError(
            f"{file}: the names of the pictures have two orders, 1 2 10 and 1 10 2, so it is not known which line is "
            "whose: give prompts.csv with file_name and prompt"
        )
    return {name: lines[place] for place, name in enumerate(names, start=1) if place in lines}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _text_folder(root: Path) -> Path | None:
    return next((root / name for name in _PROMPTS if (root / name).is_dir()), None)


def _text(folders: TwoFolders, name: str, better: Path, worse: Path, options: ReadOptions) -> str | BadRow | None:
    """The text beside either picture, or of their name in the folder of texts."""
    where = f"{folders.root.name}:{name}"
    apart = _text_folder(folders.root)
    places = [better, worse, *([apart / better.relative_to(folders.chosen)] if apart is not None else [])]
    found = [text for text in map(text_beside, places) if text is not None]
    try:
        texts = dict.fromkeys(text_of(folders.root, path, options.encoding) for path in found)
    except (ValueError, OSError) as error:
        return BadRow(where, f"its text cannot be used: {error}")
    if len(texts) > 1:
        return BadRow(where, "has two prompts, one beside each picture")
    return next(iter(texts), None)
