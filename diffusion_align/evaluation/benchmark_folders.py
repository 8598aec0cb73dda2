"""Folders of pictures for the scorers of other benchmarks, made from a folder in GenEval's layout.

    DPG-Bench         dpg/<item_id>.png: four pictures of a prompt as one, two by two, or the only one as it is
    T2I-CompBench     compbench/[<category>/]samples/<prompt>_<000000>.png, numbered through in each category

Both scorers take every file of a folder for a picture, so these folders hold nothing else: the manifest lies beside
them, and an unfinished picture lies elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images import encode_png
from .picture_folder import (
    MANIFEST,
    METADATA,
    claim,
    is_whole,
    missing_pictures,
    picture_path,
    read_picture,
    write_atomically,
)

NAME_BYTES = 255  # what file systems take for one name
DPG_COUNTS = (1, 4)  # pictures of a prompt that DPG-Bench takes
_SAFE = re.compile(r"[A-Za-z0-9_-]{1,200}")  # DPG-Bench's scorer ends the id at the first dot
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Drawn:
    """A complete folder in GenEval's layout: what its manifest says, and each prompt's metadata."""

    folder: Path
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    per_prompt: int


class NotDrawn(ValueError):
    """A folder that is not in GenEval's layout, or lacks pictures."""


@dataclass(frozen=True)
class Target:
    """A file to write, relative to the layout's folder, and the numbers of the pictures that it shows."""

    path: Path
    numbers: tuple[int, ...]


def read_drawn(folder: str | Path) -> Drawn:
    """What a folder holds.

    Raises:
        NotDrawn: no folder in GenEval's layout, or one that lacks pictures.
        ValueError: a prompt of its manifest differs from its metadata.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise NotDrawn(f"{folder} has no {MANIFEST}")
    facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    prompts, per_prompt = facts.pop("prompts"), facts.get("per_prompt", 1)
    missing = missing_pictures(folder, len(prompts) * per_prompt, per_prompt)
    if missing:
        first = picture_path(folder, missing[0], per_prompt)
        count = len(prompts) * per_prompt
        raise NotDrawn(f"{len(missing)} of {count} pictures are missing or incomplete, the first {first}")
    return Drawn(folder, facts, [_row(folder, place, prompt) for place, prompt in enumerate(prompts)], per_prompt)


def _row(folder: Path, place: int, prompt: str) -> dict[str, Any]:
    path = folder / f"{place:05d}" / METADATA
    row = json.loads(path.read_text(encoding="utf-8"))
    if row["prompt"] != prompt:
        raise ValueError(f"{path} is of another prompt than {MANIFEST}: draw into a new folder")
    return row


def dpg_targets(drawn: Drawn) -> list[Target]:
    """`<item_id>.png` for each prompt.

    Raises:
        ValueError: neither 1 nor 4 pictures of a prompt, or an id that is missing, used twice or not a safe name.
    """
    per_prompt = drawn.per_prompt
    if per_prompt not in DPG_COUNTS:
        raise ValueError(f"DPG-Bench takes 4 pictures of a prompt, or 1, not {per_prompt}")
    seen: dict[str, int] = {}
    for place, row in enumerate(drawn.rows):
        name = row.get("item_id")
        if name is None:
            raise ValueError(
                f"prompt {place} has no item_id, by which DPG-Bench finds its questions: draw the list dpg-bench, or "
                "the folder of its prompt files"
            )
        if not _SAFE.fullmatch(str(name)):
            raise ValueError(f"prompt {place}: item_id {name!r:.80} is not letters, digits, - and _ alone")
        # Not all file systems tell A from a.
        if str(name).lower() in seen:
            raise ValueError(f"prompts {seen[str(name).lower()]} and {place} have one item_id, {name}")
        seen[str(name).lower()] = place
    return [
        Target(Path(f"{row['item_id']}.png"), tuple(range(place * per_prompt, (place + 1) * per_prompt)))
        for place, row in enumerate(drawn.rows)
    ]


def compbench_targets(drawn: Drawn) -> list[Target]:
    """`<prompt>_<000000>.png` for each picture, in a folder for each category where the list has any.

    Raises:
        ValueError: a prompt that cannot be in a file's name, or that the scorers could not read from one.
    """
    targets, numbered = [], {}
    for place, row in enumerate(drawn.rows):
        category = row.get("category") or ""
        if category and not _SAFE.fullmatch(str(category)):
            raise ValueError(f"prompt {place}: category {category!r:.80} is not letters, digits, - and _ alone")
        for which in range(drawn.per_prompt):
            number = numbered.get(category, 0)
            numbered[category] = number + 1
            name = f"{row['prompt']}_{number:06d}.png"
            fault = unsafe(row["prompt"], name)
            if fault is not None:
                raise ValueError(
                    f"prompt {place} {fault}, and T2I-CompBench's scorers read the prompt from the file's name: "
                    "leave it out of the list"
                )
            targets.append(Target(Path(category) / "samples" / name, (place * drawn.per_prompt + which,)))
    return targets


def unsafe(prompt: str, name: str) -> str | None:
    """Why a prompt cannot be in the name of a file that T2I-CompBench's scorers read; None when it can."""
    if "_" in prompt:
        return "has _, which ends the prompt in the name"
    if "/" in prompt or "\\" in prompt or _CONTROL.search(prompt):
        return "has a slash or a control character"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "holds a lone surrogate"
    return f"makes a name of {size} bytes, more than {NAME_BYTES}" if size > NAME_BYTES else None


TARGETS = {"dpg": dpg_targets, "compbench": compbench_targets}


def arrange(drawn: Drawn, out: str | Path, layout: str) -> Iterator[Path]:
    """Write the files of a layout into `out`/`layout` and yield each path; complete files stay as they are.

    `out`/`layout`.json says which pictures they are; a folder made of other pictures is refused.

    Raises:
        ValueError: as the layout's targets; other pictures in the folder, or a file of no prompt.
    """
    targets, out = TARGETS[layout](drawn), Path(out)
    home, staging = out / layout, out / f".{layout}"
    staging.mkdir(parents=True, exist_ok=True)
    claim(out / f"{layout}.json", [row["prompt"] for row in drawn.rows], {**drawn.facts, "layout": layout})
    _refuse_others(home, targets)
    for target in targets:
        path = home / target.path
        if not is_whole(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            pictures = [read_picture(drawn.folder, number, drawn.per_prompt) for number in target.numbers]
            write_atomically(path, encode_png(grid(pictures, path.name)), staging)
        yield path
    for left in staging.iterdir():  # by a process that was killed
        left.unlink()
    staging.rmdir()


def grid(pictures: Sequence[Tensor], name: str) -> Tensor:
    """Four pictures [3,S,S] as one [3,2S,2S]: 0 1 above 2 3; one is itself.

    Raises:
        ValueError: several that are not squares of one size; a scorer would split them wrongly.
    """
    if len(pictures) == 1:
        return pictures[0]
    side = pictures[0].shape[-1]
    if any(picture.shape[-2:] != (side, side) for picture in pictures):
        raise ValueError(f"{name}: its pictures are not squares of one size")
    top, bottom = (torch.cat(list(pictures[i : i + 2]), dim=2) for i in (0, 2))
    return torch.cat([top, bottom], dim=1)


def _refuse_others(home: Path, targets: Sequence[Target]) -> None:
    """Refuse files of no prompt, which the scorers would count as pictures; the scorers' own .txt files may stay."""
    expected = {target.path for target in targets}
    found = (path.relative_to(home) for path in home.rglob("*") if path.is_file() and path.suffix != ".txt")
    other = next(iter(sorted(set(found) - expected)), None)
    if other is not None:
        raise ValueError(f"{home / other} is of no prompt of this list: remove it, or choose a new folder")
