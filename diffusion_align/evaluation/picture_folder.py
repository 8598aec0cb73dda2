"""A folder of pictures in GenEval's layout: what it holds is written down, and only what is missing is drawn.

<folder>/pictures.json             what the pictures were made with; another recipe is refused
         00000/metadata.jsonl      the prompt, and what its list says of it
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
        part = list(range(start, min(start + batch_size, n)))
        yield part, torch.stack([read_picture(folder, number, per_prompt) for number in part])


def replace(path: Path, data: bytes, staging: Path | None = None) -> None:
    """Write so that a file of this name is always a whole one, whenever the process is killed.

    Until it is whole it lies beside `path`, or in `staging` where others list that folder.
    """
    # Other processes may be writing the same. Not the whole name, which may be as long as names can be.
    partial = (staging or path.parent) / f".{path.name[-20:]}.{os.getpid()}.partial"
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # a part of a file would take the room that a full disk lacks
        raise


def claim(path: Path, prompts: list[str], facts: Mapping[str, Any]) -> None:
    """Write down what a folder's pictures are, or refuse it when they are something else."""
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
    replace(path, text.encode("utf-8"))


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
    """Draw into a folder what it lacks, yielding the numbers just written; what is there already stays.

    `facts` are what decides the pictures. They stand in `pictures.json`, and a folder made with others is refused, so
    a resumed run never mixes two models. The list of prompts may grow or shrink at its end between runs. `extras` [N]
    joins each prompt's `metadata.jsonl`, where scorers look for tags. `shard` (i, n) draws prompts i, i + n, ... only:
    n processes, each with its own i, fill one folder without drawing a picture twice.

    Args:
        draw: given numbers of pictures, yields them in batches.

    Raises:
        ValueError: the folder holds other pictures, or a shard that there is not; and as `draw` does.
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
            replace(picture_path(folder, number, per_prompt), encode_png(image))
        yield numbers


def _describe(
    folder: Path, prompts: Sequence[str], extras: Sequence[Mapping[str, Any]] | None, places: Iterable[int]
) -> None:
    """Each prompt's folder, with the metadata.jsonl that GenEval's scorer and its like read."""
    for place in places:
        home = folder / f"{place:05d}"
        (home / "samples").mkdir(parents=True, exist_ok=True)
        line = json.dumps({**(extras[place] if extras else {}), "prompt": prompts[place]})
        if not (home / METADATA).is_file() or (home / METADATA).read_text(encoding="utf-8") != line + "\n":
            replace(home / METADATA, f"{line}\n".encode())


def missing_pictures(folder: str | Path, n: int, per_prompt: int = 1) -> list[int]:
    """Which of the first n pictures are not there, or not whole."""
    return [number for number in range(n) if not is_whole(picture_path(folder, number, per_prompt))]


def is_whole(path: Path) -> bool:
    """Whether a picture lies there and can be read to its end."""
    try:
        read_png(path)
    except (ImageError, FileNotFoundError):
        return False
    return True
