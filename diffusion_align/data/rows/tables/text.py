"""Text files of every encoding, plain or compressed, as streams of UTF-8.

The encoding is told by the byte order mark, by the zeros of UTF-16 without a mark, or by the caller; else it is UTF-8.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.rows.archives.zip_members import ZipMember

TextFile = Path | ZipMember
_HEAD = 1 << 16
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig",
}  # fmt: skip
_UNPACK: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda stream: pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd"),
}
PACKED = tuple(_UNPACK)
# What a damaged or cut compressed file raises, and UTF-16 or UTF-32 that is damaged.
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException, UnicodeError)


@dataclass(frozen=True)
class ReadOptions:
    """What a person knows of files that the files do not tell.

    Attributes:
        encoding: of texts without a byte order mark; empty for UTF-8.
        columns: our names for columns -> theirs.
    """

    encoding: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)


PLAIN = ReadOptions()


def kind_of(file: TextFile) -> str:
    """The suffix of a file in small letters, without that of its compression: pairs.JSONL.gz -> .jsonl."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in PACKED else suffix


def is_packed(file: TextFile) -> bool:
    """Whether a file is compressed, by its name."""
    return file.suffix.lower() in PACKED


def text_encoding(head: bytes, asked: str = "") -> str:
    """The encoding of a text that begins with `head`; `asked` counts where nothing else tells."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    start = head[:1000]
    even, odd = start[0::2].count(0), start[1::2].count(0)
    if len(start) > 3 and max(even, odd) > len(start) // 4 and min(even, odd) < len(start) // 20:
        return "utf-16-le" if odd > even else "utf-16-be"
    return asked or "utf-8"


def decoded(data: bytes, asked: str = "") -> str:
    """A text; ValueError, with the byte and the likely encoding, if it is in another one."""
    encoding = text_encoding(data, asked)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(not_text(error, data)) from error


def not_text(error: UnicodeDecodeError, data: bytes) -> str:
    """In which encoding a text is not, and in which it is perhaps."""
    other = "" if error.encoding in ("utf-8", "utf-8-sig") else f", nor in {error.encoding}"
    where = f"is not text in UTF-8{other} (byte 0x{data[error.start]:02x})"
    if b"\x00" in data:
        return where
    foreign = sum(byte > 127 for byte in data)
    if foreign > len(data) // 4:
        return f"{where}: give its encoding, such as cp1251, gb18030, shift_jis or euc_kr, or save it as UTF-8"
    return f"{where}, likely in Windows-1252: give the encoding cp1252, or save it as UTF-8"


@contextmanager
def open_utf8(file: TextFile, asked: str = "") -> Iterator[BinaryIO]:
    """The bytes of a text in UTF-8 without a mark, whatever its encoding and compression.

    Bytes that its encoding does not have stay as they are, so that only their line is broken. Lines that end as on old
    Macs, with a carriage return alone, end with a line feed.

    Raises:
        DataError: from the stream, if the file is damaged or cut off.
    """
    with file.open("rb") as raw:
        source = _UNPACK[file.suffix.lower()](raw) if is_packed(file) else raw
        with _damage(file):
            head = source.read(_HEAD)
        chunks = _chunks(file, source, head, asked)
        yield cast(BinaryIO, io.BufferedReader(_Chunks(chunks)))


def _chunks(file: TextFile, source: Any, head: bytes, asked: str) -> Iterator[bytes]:
    encoding = text_encoding(head, asked)
    plain = encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig")
    decoder = None if plain else codecs.getincrementaldecoder(encoding)("surrogateescape")
    data = head.removeprefix(codecs.BOM_UTF8) if plain else head
    old_mac = b"\n" not in head and b"\r" in head
    while data:
        with _damage(file):
            text = data if decoder is None else decoder.decode(data).encode("utf-8", "surrogateescape")
        if text := text.removeprefix(codecs.BOM_UTF8) if data is head else text:
            yield text.replace(b"\r", b"\n") if old_mac else text
        with _damage(file):
            data = source.read(_HEAD)
    if decoder is not None:
        with _damage(file):
            rest = decoder.decode(b"", final=True)
        yield rest.encode("utf-8", "surrogateescape")


@contextmanager
def _damage(file: TextFile) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(
            f"{file}: is damaged or cut off ({' '.join(str(error).split())[:200]}); fetch the file again"
        ) from error


class _Chunks(io.RawIOBase):
    """A stream of the bytes that an iterator gives."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
