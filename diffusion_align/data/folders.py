"""What is no table: a folder of pictures with captions beside them (kohya's), and a list of prompts."""

from collections.abc import Iterator
from pathlib import Path

from diffusion_align.data.raw_rows import BadRow, lines_of
from diffusion_align.data.records import Record
from diffusion_align.data.tar_rows import PICTURES

_MAX_CAPTION = 1024 * 1024


def captioned(folder: Path) -> list[Path]:
    """The pictures of a folder and its folders; none unless some picture has a .txt of its name beside it."""
    found = sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in PICTURES)
    return found if any(path.with_suffix(".txt").is_file() for path in found) else []


def captions(folder: Path, pictures: list[Path]) -> Iterator[BadRow | Record]:
    """Each picture with the text beside it."""
    for number, path in enumerate(pictures):
        name = path.relative_to(folder).as_posix()
        beside = path.with_suffix(".txt")
        try:
            if not beside.is_file():
                yield BadRow(name, f"has no {beside.name} beside it")
            elif not beside.resolve().is_relative_to(folder.resolve()):
                yield BadRow(name, f"{beside.name} leads outside")
            elif beside.stat().st_size > _MAX_CAPTION:
                yield BadRow(name, f"{beside.name} holds over {_MAX_CAPTION:,} bytes")
            else:
                text = beside.read_text(encoding="utf-8").strip()
                yield Record(name, {"file_name": name, "prompt": text}, folder, number, root=folder)
        except (UnicodeDecodeError, OSError, RuntimeError) as error:
            yield BadRow(name, f"{beside.name} cannot be read ({error})")


def prompt_lines(file: Path) -> Iterator[BadRow | Record]:
    """Each line that is not blank, counted from 1."""
    for number, line in lines_of(file):
        where = f"{file.name}:{number}"
        try:
            yield Record(where, {"prompt": line.decode("utf-8-sig").strip()}, file, number)
        except UnicodeDecodeError:
            yield BadRow(where, "is not text in UTF-8")
