"""Prompt lists as people have them, made ones that `prompts` reads: UTF-16, no ending, an object of JSON."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusion_align.data.raw_rows import DataError

KNOWN = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv")
PLAIN = ("", ".text", ".list", ".lst", ".prompt", ".prompts")  # endings that say nothing; the content does
LISTS = ("prompts", "prompt", "captions", "texts", "data", "items", "rows", "samples")
_TEXT = ("prompt", "caption", "text")
_LARGEST = 64 << 20  # a longer file is left to the readers that stream
_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip


@contextmanager
def as_known(path: Path) -> Iterator[Path]:
    """The file itself, or a copy in UTF-8 with an ending that its content has. Folders and parquet are left alone.

    Raises:
        DataError: the text is in another encoding, with the likely one and the cure; or an object that is no list.
    """
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in KNOWN + PLAIN or path.stat().st_size > _LARGEST:
        yield path
        return
    content = path.read_bytes()
    encoding = _encoding(content)
    text = _decoded(path, content, encoding)
    kind = suffix if suffix in KNOWN else _kind(text)
    if kind in (".json", ".jsonl") and text.lstrip().startswith("{"):
        kind, text = _object(path, kind, text)
    elif encoding == "utf-8-sig" and kind == path.suffix:
        yield path
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder) / f"{path.stem}{kind}"
        copy.write_text(text, encoding="utf-8", newline="")
        try:
            yield copy
        except DataError as error:
            raise DataError(str(error).replace(os.fspath(copy), os.fspath(path))) from error


def _encoding(content: bytes) -> str:
    """By the mark in front, or where every other byte of what is mostly English is zero."""
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            return name
    start = content[:1000]
    even, odd = start[0::2].count(0), start[1::2].count(0)
    if len(start) > 3 and max(even, odd) > len(start) // 4 and min(even, odd) < len(start) // 20:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8-sig"


def _decoded(path: Path, content: bytes, encoding: str) -> str:
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\x00" in content:
            raise DataError(f"{path}: is no text") from error
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise DataError(
            f"{path}:{line} is not text in UTF-8 (byte 0x{byte:02x}), likely in Windows-1252: save it as UTF-8, or "
            f"`iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8{path.suffix or '.txt'}`"
        ) from error
    return text.removeprefix("\ufeff")


def _kind(text: str) -> str:
    start = text.lstrip()[:1]
    if start in ("[", "{"):
        return ".json"
    head = text.lstrip().partition("\n")[0].lower().split("\t")
    return ".tsv" if len(head) > 1 and {*head} & {*_TEXT, "prompts"} else ".txt"


def _object(path: Path, kind: str, text: str) -> tuple[str, str]:
    """A file that begins with an object: lines of them, or one that holds the list. (ending, text)"""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ".jsonl", text  # whose reader says which line is none
    return (kind, text) if kind == ".jsonl" and _is_row(found) else (".json", json.dumps(_items(path, found)))


def _is_row(found: Any) -> bool:
    return isinstance(found, dict) and any(isinstance(found.get(key), str) for key in found if key.lower() in _TEXT)


def _items(path: Path, found: dict[str, Any]) -> list[Any]:
    """The list in an object: under one of the usual names, the values of a table of texts or rows, or the one row."""
    for name in LISTS:
        for key, value in found.items():
            if key.lower() == name and isinstance(value, list):
                return value
    if _is_row(found):
        return [found]
    values = list(found.values())
    if values and all(isinstance(value, str) for value in values):
        return [{"prompt": value, "item_id": key} for key, value in found.items()]
    if values and all(_is_row(value) for value in values):
        return [{"item_id": key, **value} for key, value in found.items()]
    raise DataError(
        f"{path}: is an object with {', '.join(map(repr, list(found)[:8])) or 'nothing'}, not a list of prompts; "
        'give {"prompts": [...]}, or a .txt with one a line'
    )
