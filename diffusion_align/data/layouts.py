"""The layouts that preference pairs come in, each read row by row into pairs and bad rows. No picture is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.data import readers
from diffusion_align.data.readers import BadRow, DataError, ParquetCell

Picture = bytes | Path | ParquetCell


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures of one prompt, of which the first was preferred. `id` is file:row; `weight` scales its loss."""

    id: str
    prompt: str
    winner: Picture
    loser: Picture
    weight: float = 1.0


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
    if not isinstance(prompt, str):
        bad.append(BadRow(where, f"the prompt is {type(prompt).__name__}, not text"))
        return
    try:
        prompt.encode()
    except UnicodeEncodeError:
        bad.append(BadRow(where, "the prompt holds a lone surrogate, which is no text in UTF-8"))
        return
    pairs.append(Pair(where, prompt, *pictures))


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
    """The picture of one side, or the reason why there is none. A path that leaves the root stops the reading."""
    name = row.get(f"{side}_file_name", row.get(side))
    if name is None:
        keys = ", ".join(map(repr, list(row)[:8]))
        return f"is no pair: {side!r} (or '{side}_file_name') is missing; it has {keys}"
    if not isinstance(name, str) or not name:
        return f"{side!r} is {type(name).__name__}, not a file name"
    try:
        path = readers.inside(root, name)
        if path.is_file():
            return path
    except DataError:
        raise
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, a name too long, a loop of links
        return f"picture {name[:80]!r} cannot be looked up ({error})"
    return f"picture {name[:200]!r} does not exist in {root}"
