"""Pictures of every kind that a data set may hold: their bytes, and whether they are usable."""

import io
import random
import struct
import zlib
from typing import Any

from PIL import Image

_SIDE = 24


def _saved(mode: str, format: str, size: tuple[int, int] = (_SIDE, _SIDE), **options: Any) -> bytes:
    image = Image.new("RGB", size)
    image.putdata([(x * 7 % 256, x * 13 % 256, x * 29 % 256) for x in range(size[0] * size[1])])
    if mode == "I;16":
        image = Image.frombytes(
            "I;16", size, bytes(range(256)) * (size[0] * size[1] * 2 // 256 + 1), "raw", "I;16", 0, 1
        )
    elif mode == "LA":
        image = image.convert("L").convert("LA")
    elif mode != "RGB":
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def _animated(format: str) -> bytes:
    frames = [Image.new("RGB", (_SIDE, _SIDE), (shade, 0, 0)) for shade in (0, 120, 240)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format=format, save_all=True, append_images=frames[1:], duration=40)
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims many pixels, without data for them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


_INTACT = {"jpeg": _saved("RGB", "JPEG"), "png": _saved("RGB", "PNG"), "webp": _saved("RGB", "WEBP")}
# Tag 0x0112 is the orientation, 6 a quarter turn.
_TURNED = Image.Exif()
_TURNED[0x0112] = 6
PICTURES: dict[str, tuple[bytes | None, bool]] = {
    **{name: (data, True) for name, data in _INTACT.items()},
    "gif": (_saved("P", "GIF"), True),
    "bmp": (_saved("RGB", "BMP"), True),
    "tiff": (_saved("RGB", "TIFF"), True),
    "16 bits": (_saved("I;16", "PNG"), True),
    "cmyk": (_saved("CMYK", "JPEG"), True),
    "palette": (_saved("P", "PNG"), True),
    "palette, one colour clear": (_saved("P", "PNG", transparency=0), True),
    "grey with alpha": (_saved("LA", "PNG"), True),
    "alpha": (_saved("RGBA", "PNG"), True),
    "one bit": (_saved("1", "PNG"), True),
    "turned": (_saved("RGB", "JPEG", exif=_TURNED), True),
    "wide": (_saved("RGB", "PNG", (400, 8)), True),
    "animated gif": (_animated("GIF"), True),
    "animated webp": (_animated("WEBP"), True),
    "animated png": (_animated("PNG"), True),
    **{f"cut {name}": (data[: len(data) // 2], False) for name, data in _INTACT.items()},
    "1 x 500": (_saved("RGB", "PNG", (1, 500)), False),
    "floats": (_saved("F", "TIFF"), False),
    "bomb": (_png_header(30_000, 30_000), False),
    "no pixels": (_png_header(64, 64), False),
    "empty": (b"", False),
    "text": (b"<html>404 Not Found</html>", False),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\nshowpage\n", False),
    "null": (None, False),
}


def garbled(draw: random.Random) -> bytes:
    """A good picture with some bytes changed or removed; it may still decode."""
    data = bytearray(draw.choice(list(_INTACT.values())))
    for _ in range(draw.choice((1, 3, 20))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    if draw.random() < 0.3:
        start = draw.randrange(len(data))
        del data[start : start + draw.randrange(1, 50)]
    return bytes(data)
