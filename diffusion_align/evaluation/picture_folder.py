"""A folder of pictures in GenEval's layout. It says how they were made, and only missing pictures are drawn.

<folder>/pictures.json             how the pictures were made; a folder made otherwise is refused
         00000/metadata.jsonl      the prompt, and its columns in the list of prompts
               samples/0000.png    its pictures
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images import ImageError, decode_image, encode_png

MANIFEST = "pictures.json"
METADATA = "metadata.jsonl"

Batch = tuple[list[int], Tensor]  # numbers of the pictures, pictures [b,3,H,W] float32 in [0, 1] on the CPU


def picture_path(folder: str | Path, number: int, per_prompt: int = 1) -> Path:
    """Where a picture lies, in GenEval's layout (Ghosh et al. 2023, arXiv 2310.11513): 00000/samples/0000.png.

    Numbers, never the prompt's own text, which may be hostile as a file name.
    """
    prompt, which = divmod(number, per_prompt)
    return Path(folder) / f"{prompt:05d}" / "samples" / f"{which:04d}.png"


def read_picture(folder: str | Path, number: int, per_prompt: int = 1) -> Tensor:
    """One saved picture [3,H,W] in [0, 1]. Raises ImageError (a ValueError) or FileNotFoundError naming the file."""
    return read_png(picture_path(folder, number, per_prompt))


def read_png(path: Path) -> Tensor:
    """A picture's file as [3,H,W] in [0, 1]. Raises as `read_picture`."""
    try:
        image = decode_image(path.read_bytes())
    except ImageError as error:
        raise ImageError(f"{path} {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32) / 255


def read_pictures(folder: str | Path, n: int, batch_size: int = 64, per_prompt: int = 1) -> Iterator[Batch]:
    """The first n saved pictures in order, in the form in which `generate` yields them."""
    for start in range(0, n, batch_size):
        chunk = list(range(start, min(start + batch_size, n)))
        yield chunk, torch.stack([read_picture(folder, number, per_prompt) for number in chunk])


def write_atomically(path: Path, data: bytes, staging: Path | None = None) -> None:
    """Write a file that is never there half written, even when the process is killed.

    The unfinished file lies beside `path`, or in `staging` where other programs list that folder.
    """
    # With the process's id, because others may write the same file; a whole name may be as long as names can be.
    partial = (staging or path.parent) / f".{path.name[-20:]}.{os.getpid()}.partial"
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # it would take room that a full disk lacks
        raise


def claim(path: Path, prompts: list[str], facts: Mapping[str, Any]) -> None:
    """Write a folder's manifest at `path`; raise ValueError where it holds pictures of other facts or prompts."""
    folder = path.parent
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        known = old.pop("prompts")
        other = sorted(key for key in old.keys() | facts.keys() if old.get(key) != facts.get(key))
        if other:
            raise ValueError(f"{folder} holds pictures made with another {', '.join(other)}: choose a new folder")
        changed = next((i for i, (a, b) in enumerate(zip(known, prompts, strict=False)) if a != b), None)
        if changed is not None:
            raise ValueError(f"{folder} holds pictures of other prompts (number {changed}): choose a new folder")
        prompts = max(known, prompts, key=len)
    text = json.dumps({**facts, "prompts": prompts}, indent=1, sort_keys=True)
    write_atomically(path, text.encode("utf-8"))


def fill(
    folder: str | Path,
    prompts: Sequence[str],
    draw: Callable[[list[int]], Iterator[Batch]],
    facts: Mapping[str, Any],
    *,
    per_prompt: int = 1,
    shard: tuple[int, int] = (0, 1),
    extras: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[list[int]]:
    """Draw the pictures that a folder lacks and yield the numbers just written; complete pictures stay.

    Args:
        draw: given numbers of pictures, yields them in batches.
        facts: what decides the pictures. `pictures.json` holds them, and a folder made with other facts is refused, so
            a resumed run never mixes two models. The list of prompts may grow or shrink at its end between runs.
        shard: (i, n) draws prompts i, i + n, ... only: n processes, each with its own i, fill one folder without
            drawing a picture twice.
        extras: [N] further entries of each prompt's `metadata.jsonl`, where scorers look for tags.

    Raises:
        ValueError: the folder holds other pictures, or there is no such shard; and as `draw` does.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard {index} of {count}: shards are counted from 0")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    several = {"per_prompt": per_prompt} if per_prompt > 1 else {}
    claim(folder / MANIFEST, list(prompts), {**several, **facts})
    _describe(folder, prompts, extras, range(index, len(prompts), count))
    missing = [
        number
        for number in range(len(prompts) * per_prompt)
        if number // per_prompt % count == index and not is_whole(picture_path(folder, number, per_prompt))
    ]
    for numbers, images in draw(missing):
        for number, image in zip(numbers, images, strict=True):
            write_atomically(picture_path(folder, number, per_prompt), encode_png(image))
        yield numbers


def _describe(
    folder: Path, prompts: Sequence[str], extras: Sequence[Mapping[str, Any]] | None, numbers: Iterable[int]
) -> None:
    """Each prompt's folder, with the metadata.jsonl that GenEval's scorer and its like read."""
    for number in numbers:
        home = folder / f"{number:05d}"
        (home / "samples").mkdir(parents=True, exist_ok=True)
        line = json.dumps({**(extras[number] if extras else {}), "prompt": prompts[number]})
        if not (home / METADATA).is_file() or (home / METADATA).read_text(encoding="utf-8") != line + "\n":
            write_atomically(home / METADATA, f"{line}\n".encode())


def missing_pictures(folder: str | Path, n: int, per_prompt: int = 1) -> list[int]:
    """Which of the first n pictures are missing or incomplete."""
    return [number for number in range(n) if not is_whole(picture_path(folder, number, per_prompt))]


def is_whole(path: Path) -> bool:
    """Whether a picture is there and can be read to its end."""
    try:
        read_png(path)
    except (ImageError, FileNotFoundError):
        return False
    return True
