"""Rows of webdataset archives. Nothing is ever extracted: a picture stays in its archive, at an offset.

Only headers are read, and only plain files with known suffixes are offered. Links, devices, paths that lead out, names
over 255 bytes and members over a limit are refused one by one; an archive that is cut off, damaged, compressed or
endless is refused. Members with other suffixes are never read, so no pickle in an archive can run.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.rows.archives.limits import MAX_MEMBERS as MAX_TAR_MEMBERS
from diffusion_align.data.rows.archives.limits import PICTURE_SUFFIXES, TEXT_SUFFIXES, member_fault
from diffusion_align.data.rows.archives.samples import archive_layout, sample_rows, samples
from diffusion_align.data.rows.known_layouts import Layout
from diffusion_align.data.rows.listing import HIDDEN, is_side_path
from diffusion_align.data.rows.raw_rows import RawRow, TarMember
from diffusion_align.system.printable import printable

# A header that only names the next member: no name that is accepted needs more.
_MAX_EXTENSION = 64 * 1024
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
    """The layout of an archive's first samples. DataError if there is none, or if this is not a plain tar."""
    unread: Counter[str] = Counter()
    return archive_layout(file, samples(file, _members(file, unread)), unread)


def tar_rows(file: Path, layout: Layout, unread: Counter[str], encoding: str = "") -> Iterator[BadRow | RawRow]:
    """The samples of an archive as rows of Pick-a-Pic, or of pictures with captions.

    Members of other suffixes are counted in `unread` by suffix, and hidden ones together.

    Raises:
        DataError: not a plain tar, damaged or cut off, or more than MAX_TAR_MEMBERS.
    """
    yield from sample_rows(file, samples(file, _members(file, unread)), layout, encoding)


def _members(file: Path, unread: Counter[str]) -> Iterator[BadRow | tuple[str, TarMember]]:
    """Name and place of every picture and text of an archive, in its order, and a BadRow for what is refused."""
    with file.open("rb") as stream:
        for count, (info, offset) in enumerate(_headers(file, stream), start=1):
            if count > MAX_TAR_MEMBERS:
                raise DataError(f"{file}: has more than {MAX_TAR_MEMBERS:,} members; split it into shards")
            if info.isdir():
                continue
            if is_side_path(info.name):
                unread[HIDDEN] += 1
                continue
            suffix = info.name.rpartition(".")[2].lower() if "." in info.name else ""
            fault = _fault(info, suffix)
            if fault is not None:
                yield BadRow(f"{file.name}:{info.name[:80]}", fault)
            elif suffix in PICTURE_SUFFIXES | TEXT_SUFFIXES:
                yield info.name, TarMember(file, offset, info.size, info.name)
            else:
                unread[printable(f".{suffix}")[:20]] += 1


def _fault(info: tarfile.TarInfo, suffix: str) -> str | None:
    """Why a member is refused; None if it is not."""
    if info.type in _KINDS or not info.isreg():
        return f"is {_KINDS.get(info.type, f'of type {info.type!r}')}, not a plain file: refused"
    return member_fault(info.name, suffix, info.size)


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
