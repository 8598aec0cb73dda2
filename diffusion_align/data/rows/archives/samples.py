"""The samples of an archive: members that share a name, such as 07.png with 07.txt, wherever they stand in it.

A sample whose members follow one another is given at once. Members that make none by themselves are kept until the end
of the archive and joined with the others of their name.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.rows.archives.limits import PICTURE_SUFFIXES, TEXT_SUFFIXES
from diffusion_align.data.rows.archives.zip_members import ZipMember
from diffusion_align.data.rows.known_layouts import CAPTIONS, PICK_A_PIC, Layout
from diffusion_align.data.rows.raw_rows import PROMPT_COLUMNS, RawRow, TarMember
from diffusion_align.data.rows.tables.text import decoded

Member = TarMember | ZipMember
Sample = dict[str, Member]
_SAMPLES_FOR_LAYOUT = 20
_PICKED = ("jpg_0", "jpg_1", "label_0", "label_1")
# The end of a name that says what a member is: the last suffix, with the column before it in Pick-a-Pic's archives.
_END = re.compile(rf"(?:({'|'.join((*_PICKED, *PROMPT_COLUMNS, 'model_0', 'model_1'))})\.)?[^.]*$", re.IGNORECASE)


def archive_layout(file: Path, found: Iterable[BadRow | tuple[str, Sample]], unread: Iterable[str]) -> Layout:
    """The layout of an archive's first samples: Pick-a-Pic's names, or a picture and its text.

    Raises:
        DataError: neither, with the names found.
    """
    first = [entry for entry in islice(found, _SAMPLES_FOR_LAYOUT) if not isinstance(entry, BadRow)]
    names = list(dict.fromkeys(name for _, sample in first for name in sample))
    if any(name.startswith(("jpg_0.", "label_0.")) for name in names):
        has = {name.partition(".")[0] for name in names}
        lacks = [name for name in _PICKED if name not in has]
        if lacks:
            raise DataError(f"{file}: a Pick-a-Pic archive without {lacks[0]}; its samples have {', '.join(names)}")
        return PICK_A_PIC
    folders = {part.lower() for key, _ in first for part in key.split("/")[:-1]}
    if {"chosen", "rejected"} <= folders or {"winner", "loser"} <= folders:
        raise DataError(f"{file}: holds pairs in two folders; unpack it, and give the folder")
    if any(_suffix(name) in PICTURE_SUFFIXES for name in names):
        return CAPTIONS
    shown = ", ".join([*names, *unread][:8]) or "nothing"
    raise DataError(
        f"{file}: no sample here is known (found {shown}); give jpg_0.jpg, jpg_1.jpg, label_0.txt, label_1.txt, "
        "original_prompt.txt, or pictures with .txt or .json of the same name"
    )


def sample_rows(
    file: Path, found: Iterable[BadRow | tuple[str, Sample]], layout: Layout, encoding: str
) -> Iterator[BadRow | RawRow]:
    """Samples as rows of Pick-a-Pic, or of pictures with captions."""
    for entry in found:
        if isinstance(entry, BadRow):
            yield entry
            continue
        key, sample = entry
        where = f"{file.name}:{key}"
        try:
            values = _pick_a_pic(sample, encoding) if layout is PICK_A_PIC else _caption(sample, encoding)
        except (ValueError, RecursionError) as error:
            yield BadRow(where, " ".join(str(error).split())[:200])
        else:
            yield RawRow(where, values, file, 0)


def samples(file: Path, members: Iterable[BadRow | tuple[str, Member]]) -> Iterator[BadRow | tuple[str, Sample]]:
    """Members by sample: the key, and each member by the rest of its name. A BadRow for what is refused.

    As webdataset has it, the key ends at the first dot. Names with more dots, such as 22.05.png, are told apart where
    that gives samples: the key is then what stands before the last suffix.
    """
    held: dict[str, list[tuple[str, Member]]] = {}
    key, group = "", []
    for member in chain(members, [None]):
        if isinstance(member, BadRow):
            yield member
            continue
        name, rest = _key_and_rest(member[0]) if member else ("", "")
        if group and (name != key or member is None):
            done = [] if key in held else _complete(key, group)
            if not done:
                held.setdefault(key, []).extend(group)
            yield from done
            group = []
        if member:
            key = name
            group.append((rest, member[1]))
    for key, group in held.items():
        for name, parts in _split(key, group):
            twice = next((rest for place, (rest, _) in enumerate(parts) if rest in dict(parts[:place])), "")
            yield BadRow(f"{file.name}:{name}", f"has two members .{twice}") if twice else (name, dict(parts))


def _complete(key: str, group: list[tuple[str, Member]]) -> list[tuple[str, Sample]]:
    """The samples that these members are; none if one of them lacks something or has it twice."""
    found = [(name, dict(parts)) for name, parts in _split(key, group) if len(dict(parts)) == len(parts)]
    whole = sum(len(parts) for _, parts in found) == len(group) and all(_is_complete(parts) for _, parts in found)
    return found if whole else []


def _split(key: str, group: list[tuple[str, Member]]) -> list[tuple[str, list[tuple[str, Member]]]]:
    """The members by key: all under one, or by what stands before the last suffix if that makes samples of them."""
    if len(dict(group)) == len(group) and _is_complete(dict(group)):
        return [(key, group)]
    apart: dict[str, list[tuple[str, Member]]] = {}
    for rest, member in group:
        match = _END.search(rest)
        end = match[0] if match else rest
        inner = rest[: len(rest) - len(end)].rstrip(".")
        apart.setdefault(f"{key}.{inner}" if inner else key, []).append((end, member))
    if any(len(dict(parts)) == len(parts) and _is_complete(dict(parts)) for parts in apart.values()):
        return list(apart.items())
    return [(key, group)]


def _is_complete(sample: Sample) -> bool:
    has = {name.partition(".")[0] for name in sample}
    if has & set(_PICKED):
        return has >= {*_PICKED} and bool(has & {*PROMPT_COLUMNS, "txt"})
    suffixes = [_suffix(name) for name in sample]
    return sum(suffix in PICTURE_SUFFIXES for suffix in suffixes) == 1 and any(s in TEXT_SUFFIXES for s in suffixes)


def _key_and_rest(member: str) -> tuple[str, str]:
    """a/b.jpg_0.JPG -> a/b and jpg_0.jpg."""
    folder, slash, base = member.rpartition("/")
    stem, _, rest = base.partition(".")
    return f"{folder}{slash}{stem}", rest.lower()


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def _pick_a_pic(sample: Sample, encoding: str) -> dict[str, Any]:
    """Columns by name: pictures stay members, texts are read."""
    values: dict[str, Any] = {}
    for name, member in sample.items():
        column, _, suffix = name.partition(".")
        values[column if suffix else "text"] = member if suffix in PICTURE_SUFFIXES else _read(name, member, encoding)
    return values


def _caption(sample: Sample, encoding: str) -> dict[str, Any]:
    """file_name, the picture, and prompt: a text, or a JSON's prompt, caption or text."""
    pictures = [member for name, member in sample.items() if _suffix(name) in PICTURE_SUFFIXES]
    if len(pictures) != 1:
        raise ValueError(f"has {len(pictures)} pictures, not one ({', '.join(f'.{name}' for name in sample)})")
    texts = {n: _read(n, member, encoding) for n, member in sample.items() if _suffix(n) in TEXT_SUFFIXES}
    if not texts:
        raise ValueError("has no text beside its picture")
    name, text = max(texts.items())  # .txt before .json
    prompt = text.strip()
    if name.endswith("json"):
        facts = json.loads(text)
        named = facts if isinstance(facts, dict) else {}
        prompt = next((named[column] for column in PROMPT_COLUMNS if column in named), None)
    return {"file_name": pictures[0], "prompt": prompt}


def _read(name: str, member: Member, encoding: str) -> str:
    """A small text; ValueError if it is in another encoding."""
    try:
        return decoded(member.read(), encoding)
    except ValueError as error:
        raise ValueError(f".{name} {error}") from error
