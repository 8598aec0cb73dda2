"""Members of zip archives. Nothing is extracted: a member is read into memory, up to a limit.

Encrypted archives, members over a limit and names that lead out are refused, as for .tar.
"""

import io
import os
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.rows.archives.limits import MAX_MEMBERS, PICTURE_SUFFIXES, TEXT_SUFFIXES, member_fault
from diffusion_align.data.rows.listing import is_side_path
from diffusion_align.system.printable import printable

_TABLES = frozenset(("jsonl", "ndjson", "csv", "tsv"))
_MAX_TABLE = 256 << 20
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError)


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A file inside a zip archive. `member` is its name in the archive as it is stored."""

    file: Path
    member: str
    size: int

    @property
    def path(self) -> str:
        """Its name with slashes, also where the archive has backslashes."""
        return self.member.replace("\\", "/")

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> "ZipFolder":
        return ZipFolder(self.file, self.path.rpartition("/")[0])

    def __str__(self) -> str:
        return f"{self.file}:{self.path}"

    def read(self) -> bytes:
        """Its bytes; DataError if they are damaged, or more than the archive says."""
        try:
            archive = _opened(os.fspath(self.file), self.file.stat().st_mtime_ns)
            with archive.open(self.member) as stream:
                data = stream.read(self.size + 1)
        except _DAMAGE as error:
            raise DataError(f"{self}: is damaged ({error}); fetch the file again") from error
        if len(data) != self.size:
            raise DataError(f"{self}: holds other than the {self.size:,} bytes that the archive says; refused")
        return data

    def open(self, mode: str = "rb") -> BinaryIO:
        """The bytes as a stream."""
        return io.BytesIO(self.read())


@dataclass(frozen=True, slots=True)
class ZipFolder:
    """A folder inside a zip archive; the empty path is its root."""

    file: Path
    path: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.path}" if self.path else str(self.file)

    def names(self) -> dict[str, ZipMember]:
        """All pictures of the archive by name."""
        return _by_name(os.fspath(self.file), self.file.stat().st_mtime_ns)


# Threads may read at a time: zipfile holds a lock while it does.
@lru_cache(maxsize=4)
def _opened(file: str, changed: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except _DAMAGE as error:
        raise DataError(f"{file}: is not a zip archive, or damaged ({error}); fetch the file again") from error


@lru_cache(maxsize=4)
def _by_name(file: str, changed: int) -> dict[str, ZipMember]:
    return {m.path: m for m in zip_members(Path(file), Counter()) if isinstance(m, ZipMember)}


def zip_members(file: Path, unread: Counter[str]) -> list[ZipMember | BadRow]:
    """The pictures, texts and tables of an archive, in its order; a BadRow for what is refused. Other members are
    counted in `unread`."""
    found: list[ZipMember | BadRow] = []
    infos = _opened(os.fspath(file), file.stat().st_mtime_ns).infolist()
    if len(infos) > MAX_MEMBERS:
        raise DataError(f"{file}: has more than {MAX_MEMBERS:,} members; split it into shards")
    for info in infos:
        member = ZipMember(file, info.filename, info.file_size)
        suffix = member.suffix[1:].lower()
        if info.is_dir() or member.path.endswith("/"):
            continue
        if is_side_path(member.path):
            unread["hidden"] += 1
            continue
        if suffix not in PICTURE_SUFFIXES | TEXT_SUFFIXES | _TABLES:
            unread[printable(f".{suffix}")[:20]] += 1
            continue
        fault = member_fault(member.path, suffix, info.file_size if suffix not in _TABLES else 0)
        if info.flag_bits & 1:
            raise DataError(f"{file}: is encrypted; unzip it with its password, and give the folder")
        if suffix in _TABLES and info.file_size > _MAX_TABLE:
            fault = f"holds {info.file_size:,} bytes, over {_MAX_TABLE:,}: refused"
        if info.external_attr >> 28 == 0xA:
            fault = "is a symbolic link, not a plain file: refused"
        found.append(BadRow(f"{file.name}:{member.path[:80]}", fault) if fault else member)
    return found
