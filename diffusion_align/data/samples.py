"""Samples of webdataset archives: members that follow one another and share a name up to the first dot of the file."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from diffusion_align.data.known_layouts import CAPTIONS, PICK_A_PIC, Format
from diffusion_align.data.raw_rows import BadRow, DataError
from diffusion_align.data.records import PROMPTS, Record
from diffusion_align.data.tar_rows import PICTURES, TEXTS, TarMember, members

_LOOK_AT = 20


def format_of(file: Path) -> Format:
    """The layout of an archive's first samples: Pick-a-Pic's names, or a picture and its text.

    Raises:
        DataError: neither, with the names found; or not a plain tar.
    """
    unread: Counter[str] = Counter()
    first = [entry for entry in islice(samples(file, unread), _LOOK_AT) if not isinstance(entry, BadRow)]
    names = list(dict.fromkeys(name for _, sample in first for name in sample))
    if any(name.startswith(("jpg_0.", "label_0.")) for name in names):
        lacks = [name for name in ("jpg_0", "jpg_1", "label_0", "label_1") if not _has(names, name)]
        if lacks:
            raise DataError(f"{file}: a Pick-a-Pic archive without {lacks[0]}; its samples have {', '.join(names)}")
        return PICK_A_PIC
    if any(name.rpartition(".")[2] in PICTURES for name in names):
        return CAPTIONS
    found = ", ".join([*names, *unread][:8]) or "nothing"
    raise DataError(
        f"{file}: no sample here is known (found {found}); give jpg_0.jpg, jpg_1.jpg, label_0.txt, label_1.txt, "
        "original_prompt.txt, or pictures with .txt or .json of the same name"
    )


def samples(file: Path, unread: Counter[str]) -> Iterator[BadRow | tuple[str, dict[str, TarMember]]]:
    """The samples of an archive as key and members by the rest of their name, and what was refused."""
    key: str = ""
    sample: dict[str, TarMember] = {}
    twice = ""
    for member in chain(members(file, unread), [None]):
        if isinstance(member, BadRow):
            yield member
            continue
        name, rest = _parts(member[0]) if member else ("", "")
        if name != key and sample:
            yield BadRow(f"{file.name}:{key}", f"has two members .{twice}") if twice else (key, sample)
            sample, twice = {}, ""
        if member:
            key, twice = name, rest if rest in sample else twice
            sample[rest] = member[1]


def _parts(member: str) -> tuple[str, str]:
    """A member's key and the rest of its name: a/b.jpg_0.JPG -> a/b and jpg_0.jpg."""
    folder, slash, base = member.rpartition("/")
    stem, _, rest = base.partition(".")
    return f"{folder}{slash}{stem}", rest.lower()


def records(file: Path, known: Format, unread: Counter[str]) -> Iterator[BadRow | Record]:
    """The samples of an archive as records of Pick-a-Pic, or of pictures with captions."""
    for entry in samples(file, unread):
        if isinstance(entry, BadRow):
            yield entry
            continue
        key, sample = entry
        where = f"{file.name}:{key}"
        try:
            values = _pick_a_pic(sample) if known is PICK_A_PIC else _caption(sample)
        except (ValueError, RecursionError) as error:
            yield BadRow(where, " ".join(str(error).split())[:200])
        else:
            yield Record(where, values, file, 0)


def _has(names: list[str], column: str) -> bool:
    return any(name.partition(".")[0] == column for name in names)


def _pick_a_pic(sample: dict[str, TarMember]) -> dict[str, Any]:
    """Columns by name: pictures stay members, texts are read."""
    values: dict[str, Any] = {}
    for name, member in sample.items():
        column, _, suffix = name.partition(".")
        values[column if suffix else "text"] = member if suffix in PICTURES else _read(name, member)
    return values


def _caption(sample: dict[str, TarMember]) -> dict[str, Any]:
    """file_name, the picture, and prompt: a text, or a JSON's prompt, caption or text."""
    pictures = [member for name, member in sample.items() if name.rpartition(".")[2] in PICTURES]
    if len(pictures) != 1:
        raise ValueError(f"has {len(pictures)} pictures, not one ({', '.join(f'.{name}' for name in sample)})")
    texts = {name: _read(name, member) for name, member in sample.items() if name.rpartition(".")[2] in TEXTS}
    if not texts:
        raise ValueError("has no text beside its picture")
    values: dict[str, Any] = {"file_name": pictures[0]}
    for name, text in sorted(texts.items(), reverse=True):  # .txt before .json
        if name.endswith("json"):
            facts = json.loads(text)
            found = next((facts[word] for word in PROMPTS if word in facts), None) if isinstance(facts, dict) else None
            values.setdefault("prompt", found)
        else:
            values.setdefault("prompt", text.strip())
    return values


def _read(name: str, member: TarMember) -> str:
    """A small text; ValueError when it is no UTF-8."""
    try:
        return member.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f".{name} is not text in UTF-8") from error
