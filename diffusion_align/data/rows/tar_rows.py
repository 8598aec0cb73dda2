"""Rows of webdataset archives. Nothing is ever extracted: a picture stays in its archive, at an offset.

Only headers are read, and only plain files with known suffixes are offered. Links, devices, paths that lead out, names
over 255 bytes and members over a limit are refused one by one; an archive that is cut off, damaged, compressed or
endless is refused. Members with other suffixes are never read, so no pickle in an archive can run.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.rows.known_layouts import CAPTIONS, PICK_A_PIC, Layout
from diffusion_align.data.rows.raw_rows import PROMPT_COLUMNS, RawRow, TarMember
from diffusion_align.system.printable import printable

PICTURE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff"))
TEXT_SUFFIXES = frozenset(("txt", "json"))
MAX_NAME = 255
MAX_PICTURE = 256 * 1024 * 1024
MAX_TEXT = 1024 * 1024
MAX_TAR_MEMBERS = 1_000_000
# A header that only names the next member: no name that is accepted needs more.
_MAX_EXTENSION = 64 * 1024
_SAMPLES_FOR_LAYOUT = 20
_BLOCK = tarfile.BLOCKSIZE
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def tar_layout(file: Path) -> Layout:
    """The layout of an archive's first samples: Pick-a-Pic's names, or a picture and its text.

    Raises:
        DataError: neither, with the names found; or not a plain tar.
    """
    unread: Counter[str] = Counter()
    first = [entry for entry in islice(_samples(file, unread), _SAMPLES_FOR_LAYOUT) if not isinstance(entry, BadRow)]
    names = list(dict.fromkeys(name for _, sample in first for name in sample))
    if any(name.startswith(("jpg_0.", "label_0.")) for name in names):
        has = {name.partition(".")[0] for name in names}
        lacks = [name for name in ("jpg_0", "jpg_1", "label_0", "label_1") if name not in has]
        if lacks:
            raise DataError(f"{file}: a Pick-a-Pic archive without {lacks[0]}; its samples have {', '.join(names)}")
        return PICK_A_PIC
    if any(_suffix(name) in PICTURE_SUFFIXES for name in names):
        return CAPTIONS
    found = ", ".join([*names, *unread][:8]) or "nothing"
    raise DataError(
        f"{file}: no sample here is known (found {found}); give jpg_0.jpg, jpg_1.jpg, label_0.txt, label_1.txt, "
        "original_prompt.txt, or pictures with .txt or .json of the same name"
    )


def tar_rows(file: Path, layout: Layout, unread: Counter[str]) -> Iterator[BadRow | RawRow]:
    """The samples of an archive as rows of Pick-a-Pic, or of pictures with captions.

    Members of other suffixes are counted in `unread` by suffix.

    Raises:
        DataError: not a plain tar, damaged or cut off, or more than MAX_TAR_MEMBERS.
    """
    for entry in _samples(file, unread):
        if isinstance(entry, BadRow):
            yield entry
            continue
        key, sample = entry
        where = f"{file.name}:{key}"
        try:
            values = _pick_a_pic(sample) if layout is PICK_A_PIC else _caption(sample)
        except (ValueError, RecursionError) as error:
            yield BadRow(where, " ".join(str(error).split())[:200])
        else:
            yield RawRow(where, values, file, 0)


def _samples(file: Path, unread: Counter[str]) -> Iterator[BadRow | tuple[str, dict[str, TarMember]]]:
    """Members that follow one another and share a name up to the first dot of the file: their key, and each by the rest
    of its name. A BadRow for what is refused."""
    key: str = ""
    sample: dict[str, TarMember] = {}
    twice = ""
    for member in chain(_members(file, unread), [None]):
        if isinstance(member, BadRow):
            yield member
            continue
        name, rest = _key_and_rest(member[0]) if member else ("", "")
        if name != key and sample:
            yield BadRow(f"{file.name}:{key}", f"has two members .{twice}") if twice else (key, sample)
            sample, twice = {}, ""
        if member:
            key, twice = name, rest if rest in sample else twice
            sample[rest] = member[1]


def _key_and_rest(member: str) -> tuple[str, str]:
    """a/b.jpg_0.JPG -> a/b and jpg_0.jpg."""
    folder, slash, base = member.rpartition("/")
    stem, _, rest = base.partition(".")
    return f"{folder}{slash}{stem}", rest.lower()


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def _pick_a_pic(sample: dict[str, TarMember]) -> dict[str, Any]:
    """Columns by name: pictures stay members, texts are read."""
    values: dict[str, Any] = {}
    for name, member in sample.items():
        column, _, suffix = name.partition(".")
        values[column if suffix else "text"] = member if suffix in PICTURE_SUFFIXES else _read(name, member)
    return values


def _caption(sample: dict[str, TarMember]) -> dict[str, Any]:
    """file_name, the picture, and prompt: a text, or a JSON's prompt, caption or text."""
    pictures = [member for name, member in sample.items() if _suffix(name) in PICTURE_SUFFIXES]
    if len(pictures) != 1:
        raise ValueError(f"has {len(pictures)} pictures, not one ({', '.join(f'.{name}' for name in sample)})")
    texts = {name: _read(name, member) for name, member in sample.items() if _suffix(name) in TEXT_SUFFIXES}
    if not texts:
        raise ValueError("has no text beside its picture")
    name, text = max(texts.items())  # .txt before .json
    prompt = text.strip()
    if name.endswith("json"):
        facts = json.loads(text)
        named = facts if isinstance(facts, dict) else {}
        prompt = next((named[column] for column in PROMPT_COLUMNS if column in named), None)
    return {"file_name": pictures[0], "prompt": prompt}


def _read(name: str, member: TarMember) -> str:
    """A small text; ValueError if it is not UTF-8."""
    try:
        return member.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f".{name} is not text in UTF-8") from error


def _members(file: Path, unread: Counter[str]) -> Iterator[BadRow | tuple[str, TarMember]]:
    """Name and place of every picture and text of an archive, in its order, and a BadRow for what is refused."""
    with file.open("rb") as stream:
        for count, (info, offset) in enumerate(_headers(file, stream), start=1):
            if count > MAX_TAR_MEMBERS:
                raise DataError(f"{file}: has more than {MAX_TAR_MEMBERS:,} members; split it into shards")
            if info.isdir():
                continue
            suffix = info.name.rpartition(".")[2].lower() if "." in info.name else ""
            fault = _fault(info, suffix)
            if fault is not None:
                yield BadRow(f"{file.name}:{info.name[:80]}", fault)
            elif suffix in PICTURE_SUFFIXES | TEXT_SUFFIXES:
                yield info.name, TarMember(file, offset, info.size)
            else:
                unread[printable(f".{suffix}")[:20]] += 1


def _fault(info: tarfile.TarInfo, suffix: str) -> str | None:
    """Why a member is refused; None if it is not."""
    name = info.name
    parts = name.replace("\\", "/").split("/")
    if info.type in _KINDS or not info.isreg():
        return f"is {_KINDS.get(info.type, f'of type {info.type!r}')}, not a plain file: refused"
    if len(os.fsencode(name)) > MAX_NAME:
        return f"has a name of {len(os.fsencode(name))} bytes, over {MAX_NAME}: refused"
    if not name or parts[0] == "" or ".." in parts or "\0" in name or parts[0][1:2] == ":":
        return "has a path that leads outside: refused"
    limit = MAX_PICTURE if suffix in PICTURE_SUFFIXES else MAX_TEXT
    if suffix in PICTURE_SUFFIXES | TEXT_SUFFIXES and info.size > limit:
        return f"holds {info.size:,} bytes, over {limit:,}: refused"
    return None


def _headers(file: Path, stream: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Every member's header, with the long names that precede it taken up, and where its bytes begin.

    The standard library reads the headers, but not the archive: its own loop takes the length of a long name on trust.
    """
    end, place = file.stat().st_size, 0
    known: dict[str, str] = {}
    while True:
        stream.seek(place)
        try:
            info = tarfile.TarInfo.frombuf(stream.read(_BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the block of zeros that ends every archive
                return
            said = f"at byte {place:,} ({error})"
            if place == 0:
                raise DataError(f"{file}: is not a plain tar {said}; unpack it, or pack it again as .tar") from error
            raise DataError(f"{file}: is damaged or cut off {said}; fetch the file again") from error
        offset = place + _BLOCK
        extends = info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
        names = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if not (extends or names):
            info.name = known.get("path", info.name).rstrip("/" if info.isdir() else "")
            info.size = _size(file, known["size"]) if "size" in known else info.size
        # As tarfile has it: links, devices and folders have no bytes of their own, whatever their size says.
        follows = info.size if extends or names or info.isreg() or info.type not in tarfile.SUPPORTED_TYPES else 0
        if not 0 <= follows <= end - offset:
            raise DataError(
                f"{file}: is cut off: {info.name[:80]!r} at byte {place:,} has {follows:,} bytes; fetch the file again"
            )
        place = offset + -(-follows // _BLOCK) * _BLOCK
        if extends or names:
            if follows > _MAX_EXTENSION:
                raise DataError(f"{file}: a header of {follows:,} bytes at byte {offset:,} is over the limit")
            data = stream.read(follows)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                known["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type != tarfile.XGLTYPE and extends:
                known |= _pax(file, data)
            continue
        yield info, offset
        known = {}


def _size(file: Path, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise DataError(f"{file}: a header says that a member has {text[:40]!r} bytes; fetch the file again")
    return int(text)


def _pax(file: Path, data: bytes) -> dict[str, str]:
    """The records "length key=value" of a POSIX extended header that matter here: path and size."""
    found, place = {}, 0
    while place < len(data.rstrip(b"\0")):
        length, _, _ = data[place : place + 20].partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data) - place:
            raise DataError(f"{file}: an extended header is damaged; fetch the file again")
        record = data[place + len(length) + 1 : place + int(length) - 1]
        key, _, value = record.decode("utf-8", "surrogateescape").partition("=")
        if key in ("path", "size"):
            found[key] = value
        place += int(length)
    return found
