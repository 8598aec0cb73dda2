"""Pairs and rankings, where their pictures lie, and the layouts of pairs, read row by row. No picture is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.data import readers
from diffusion_align.data.readers import BadRow, DataError, ParquetCell


@dataclass(frozen=True, slots=True)
class ParquetItem:
    """One of the `of` pictures that a parquet cell lists; it stays in its file until it is asked for."""

    file: Path
    row: int
    column: str
    item: int
    of: int

    def read(self) -> bytes:
        """The picture's bytes, also from a {bytes, path} struct; DataError when there are none, or another number."""
        values = readers._cell(str(self.file), self.row, self.column)
        where = f"{self.file.name} row {self.row}: {self.column}"
        if not isinstance(values, list) or len(values) != self.of:
            found = len(values) if isinstance(values, list) else type(values).__name__
            raise DataError(f"{where} holds {found}, not the {self.of} pictures that the row ranks")
        value = values[self.item]
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise DataError(f"{where} holds no picture bytes at place {self.item}")
        return value


Picture = bytes | Path | ParquetCell | ParquetItem


def read_bytes(picture: Picture) -> bytes:
    """A picture's bytes, wherever they are; DataError or OSError when they cannot be had."""
    if isinstance(picture, bytes):
        return picture
    return picture.read_bytes() if isinstance(picture, Path) else picture.read()


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures of one prompt, of which the first was preferred. `id` is file:row; `weight` scales its loss."""

    id: str
    prompt: str
    winner: Picture
    loser: Picture
    weight: float = 1.0

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """[winner, loser]: a pair is a list of two."""
        return self.winner, self.loser


@dataclass(frozen=True, slots=True)
class Ranking:
    """K >= 2 pictures of one prompt and how good each is: `relevance` [K] in [0, 1], higher is better, not all equal.

    `id` is file:row; `scores` [M][K] are what M scorers said, where that was kept.
    """

    id: str
    prompt: str
    pictures: tuple[Picture, ...]
    relevance: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...] = ()


def read_parquet(file: Path, pairs: list[Pair], bad: list[BadRow]) -> int:
    """Append the pairs and bad rows of one parquet file; returns the number of ties."""
    present = readers.column_names(file)
    if {"chosen", "rejected"} <= set(present) and "jpg_0" not in present:
        text = "caption" if "caption" in present and "prompt" not in present else "prompt"
        readers.require_columns(file, present, [text])
        for row, values in enumerate(readers.read_columns(file, [text])):
            _append(pairs, bad, f"{file.name}:{row}", values[text], _cells(file, row, "chosen", "rejected"))
        return 0
    text = "prompt" if "prompt" in present and "caption" not in present else "caption"
    readers.require_columns(file, present, ["jpg_0", "jpg_1", "label_0", "label_1", text])
    ties = 0
    for row, values in enumerate(readers.read_columns(file, [text, "label_0", "label_1"])):
        labels = (values["label_0"], values["label_1"])
        where = f"{file.name}:{row}"
        if labels[0] == 0.5:
            ties += 1
        elif labels == (1, 0):
            _append(pairs, bad, where, values[text], _cells(file, row, "jpg_0", "jpg_1"))
        elif labels == (0, 1):
            _append(pairs, bad, where, values[text], _cells(file, row, "jpg_1", "jpg_0"))
        else:
            bad.append(
                BadRow(where, f"labels {labels[0]}, {labels[1]} say neither who won (1, 0 or 0, 1) nor tie (0.5)")
            )
    return ties


def _cells(file: Path, row: int, winner: str, loser: str) -> tuple[ParquetCell, ParquetCell]:
    return ParquetCell(file, row, winner), ParquetCell(file, row, loser)


def _append(pairs: list[Pair], bad: list[BadRow], where: str, prompt: Any, pictures: tuple[Picture, Picture]) -> None:
    fault = prompt_fault(prompt)
    if fault is None:
        pairs.append(Pair(where, prompt, *pictures))
    else:
        bad.append(BadRow(where, fault))


def prompt_fault(prompt: Any) -> str | None:
    """Why this cannot be a prompt; None when it can."""
    if not isinstance(prompt, str):
        return f"the prompt is {type(prompt).__name__}, not text"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "the prompt holds a lone surrogate, which is no text in UTF-8"
    return None


def read_jsonl(file: Path, pairs: list[Pair], bad: list[BadRow]) -> int:
    """Append the pairs and bad rows of one JSON-lines file; it has no ties."""
    root = file.parent
    for number, row in readers.jsonl_rows(file):
        where = f"{file.name}:{number}"
        if isinstance(row, ValueError):
            bad.append(BadRow(where, str(row)))
        elif not isinstance(row, dict):
            bad.append(BadRow(where, f"is a {type(row).__name__}, not an object with prompt, chosen and rejected"))
        else:
            pictures: list[Path] = []
            for side in ("chosen", "rejected"):
                found = _picture_path(root, row, side)
                if isinstance(found, str):
                    bad.append(BadRow(where, found))
                    break
                pictures.append(found)
            else:
                prompt = row.get("prompt", row.get("caption"))
                _append(pairs, bad, where, prompt, (pictures[0], pictures[1]))
    return 0


def _picture_path(root: Path, row: Mapping[str, Any], side: str) -> Path | str:
    """The picture of one side, or the reason why there is none."""
    name = row.get(f"{side}_file_name", row.get(side))
    if name is None:
        keys = ", ".join(map(repr, list(row)[:8]))
        return f"is no pair: {side!r} (or '{side}_file_name') is missing; it has {keys}"
    return find_picture(root, name, side)


def find_picture(root: Path, name: Any, what: str) -> Path | str:
    """The file that `what` names under a root, or why there is none. A path that leaves the root stops the reading."""
    if not isinstance(name, str) or not name:
        return f"{what!r} is {type(name).__name__}, not a file name"
    try:
        path = readers.inside(root, name)
        if path.is_file():
            return path
    except DataError:
        raise
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, a name too long, a loop of links
        return f"picture {name[:80]!r} cannot be looked up ({error})"
    return f"picture {name[:200]!r} does not exist in {root}"
