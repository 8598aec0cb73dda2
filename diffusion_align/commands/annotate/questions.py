"""The pictures that `sample` wrote, and the questions that a mode asks about them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from diffusion_align import rng
from diffusion_align.commands.sample.folder import LISTING
from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.disk import digest
from diffusion_align.data.images import ImageError, decode_image
from diffusion_align.data.rows.find_picture import inside
from diffusion_align.system.progress import progress_bar

TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_ENTRY = {"file": str, "prompt": str, "prompt_number": int, "image": int}

Key = tuple[str, int, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of samples.json.

    `index` is its place there and its only name on the page; `image` is its number among the pictures of its prompt;
    `digest` is that of its content when it was read.
    """

    index: int
    file: str
    path: Path
    digest: str
    prompt: str
    prompt_number: int
    image: int

    @property
    def media_type(self) -> str:
        return TYPES[Path(self.file).suffix.lower()]


@dataclass(frozen=True, slots=True)
class Question:
    """Some pictures of one prompt, by image number: which is the best, or in mode "rank" in which order."""

    mode: str
    pictures: tuple[Picture, ...]

    @property
    def prompt(self) -> str:
        return self.pictures[0].prompt

    @property
    def prompt_number(self) -> int:
        return self.pictures[0].prompt_number

    @property
    def key(self) -> Key:
        """Equal for the same question in another session."""
        return self.mode, self.prompt_number, tuple(picture.file for picture in self.pictures)

    @property
    def digest(self) -> str:
        """Digest of the prompt and the pictures' content: new pictures under old names make another question."""
        return digest(json.dumps([self.prompt, *(picture.digest for picture in self.pictures)]).encode())


def read_pictures(folder: Path) -> list[Picture]:
    """The pictures that a folder's samples.json lists; each is decoded once, so none is broken.

    Raises:
        DataError: what is missing or broken.
    """
    listing = folder / LISTING
    if not listing.is_file():
        what = f"holds no {LISTING}" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {what}; diffusion-align sample --num_images_per_prompt 2 --out FOLDER makes one")
    try:
        entries = json.loads(listing.read_bytes())["pictures"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{listing}: is not what sample writes; draw the pictures again") from error
    if not isinstance(entries, list):
        raise DataError(f"{listing}: pictures is {type(entries).__name__}, not a list; draw the pictures again")
    pictures = [
        _picture(folder, i, entry) for i, entry in enumerate(progress_bar(entries, desc="read", unit="picture"))
    ]
    prompts: dict[int, str] = {}
    seen: set[Any] = set()
    for picture in pictures:
        if prompts.setdefault(picture.prompt_number, picture.prompt) != picture.prompt:
            raise DataError(f"{listing}: prompt_number {picture.prompt_number} has two prompts; draw them again")
        if seen & (names := {picture.path, (picture.prompt_number, picture.image)}):
            raise DataError(f"{listing}: picture {picture.file!r} is listed twice; draw the pictures again")
        seen |= names
    return pictures


def _picture(folder: Path, index: int, entry: Any) -> Picture:
    where = f"{folder / LISTING}: picture {index}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {type(entry).__name__}, not an object; draw the pictures again")
    for name, kind in _ENTRY.items():
        if type(entry.get(name)) is not kind:
            raise DataError(f"{where}: {name} is {type(entry.get(name)).__name__}, not {kind.__name__}")
    file, prompt = entry["file"], entry["prompt"]
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise DataError(f"{where}: the prompt holds a lone surrogate, which is no text in UTF-8; draw without it")
    if Path(file).suffix.lower() not in TYPES:
        raise DataError(f"{where}: {file[:200]!r} is none of {', '.join(TYPES)}")
    try:
        path = inside(folder, file)
        data = path.read_bytes()
        decode_image(data)
    except ImageError as error:
        raise DataError(f"{folder}: picture {file!r} {error}; draw it again") from error
    except DataError:
        raise
    except (ValueError, OSError, RuntimeError) as error:  # missing, a null byte, a name too long, a loop of links
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{folder}: picture {file[:200]!r} cannot be read ({reason}); draw it again") from error
    return Picture(index, file, path, digest(data), prompt, entry["prompt_number"], entry["image"])


def picture_bytes(picture: Picture) -> bytes:
    """The file's content; DataError when it has changed since the start."""
    data = picture.path.read_bytes()
    if digest(data) != picture.digest:
        raise DataError(f"{picture.path}: has changed since the start; its choices would be about another picture")
    return data


def by_prompt(pictures: list[Picture]) -> dict[int, list[Picture]]:
    """The pictures of each prompt, by image number; prompts by their number."""
    groups: dict[int, list[Picture]] = {}
    for picture in sorted(pictures, key=lambda picture: (picture.prompt_number, picture.image)):
        groups.setdefault(picture.prompt_number, []).append(picture)
    return groups


def make_questions(pictures: list[Picture], mode: str, seed: int) -> list[Question]:
    """The questions of a mode ("best", "rank" or "pairs") in the order in which they are asked.

    A choice between two pictures is the same question in every mode. The order of a prompt's pairs is drawn at the
    address (seed, prompt's number). Every prompt has its first pair before any prompt has its second, so whoever stops
    early has seen all prompts. Prompts with one picture are left out.
    """
    groups = [group for group in by_prompt(pictures).values() if len(group) > 1]
    if mode != "pairs":
        return [Question("rank" if mode == "rank" and len(group) > 2 else "best", tuple(group)) for group in groups]
    rounds: list[list[Question]] = []
    for group in groups:
        pairs = list(combinations(group, 2))
        order = rng.permutation(len(pairs), seed, "annotate pairs", group[0].prompt_number).tolist()
        for place, which in enumerate(order):
            if place == len(rounds):
                rounds.append([])
            rounds[place].append(Question("best", pairs[which]))
    return [question for asked in rounds for question in asked]


def on_page(question: Question, seed: int) -> list[Picture]:
    """The pictures from left to right, in an order drawn at the question's address."""
    numbers = [picture.image for picture in question.pictures]
    order = rng.permutation(len(numbers), seed, "annotate places", question.prompt_number, *numbers)
    return [question.pictures[i] for i in order.tolist()]
