"""Pairs and rankings, and where their pictures lie. No picture is read until it is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.data import raw_rows
from diffusion_align.data.raw_rows import DataError, ParquetCell
from diffusion_align.data.tar_rows import TarMember


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
        values = raw_rows._cell(str(self.file), self.row, self.column)
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


Picture = bytes | Path | ParquetCell | ParquetItem | TarMember


def read_bytes(picture: Picture) -> bytes:
    """A picture's bytes, wherever they are; DataError or OSError when they cannot be had."""
    if isinstance(picture, bytes):
        return picture
    return picture.read_bytes() if isinstance(picture, Path) else picture.read()


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures of one prompt, of which the first was preferred. `id` is file:row; `weight` scales its loss.

    A tie, which only `read_pairs(keep_ties=True)` gives, prefers neither: `tie` is true, and its pictures are in the
    order of the data.
    """

    id: str
    prompt: str
    winner: Picture
    loser: Picture
    weight: float = 1.0
    tie: bool = False

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


def prompt_fault(prompt: Any) -> str | None:
    """Why this cannot be a prompt; None when it can."""
    if not isinstance(prompt, str):
        return f"the prompt is {type(prompt).__name__}, not text"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "the prompt holds a lone surrogate, which is no text in UTF-8"
    return None


def find_picture(root: Path, name: Any, what: str) -> Path | str:
    """The file that `what` names under a root, or why there is none. A path that leaves the root stops the reading."""
    if not isinstance(name, str) or not name:
        return f"{what!r} is {type(name).__name__}, not a file name"
    try:
        path = raw_rows.inside(root, name)
        if path.is_file():
            return path
    except DataError:
        raise
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, a name too long, a loop of links
        return f"picture {name[:80]!r} cannot be looked up ({error})"
    return f"picture {name[:200]!r} does not exist in {root}"
