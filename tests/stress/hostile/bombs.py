"""Small files of pictures that are expensive to decode; each must be refused quickly and in little memory."""

import io
import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from diffusion_align.data.images import FORMATS, ImageError, decode_image

_MIB = 1 << 20
MS, MIB = 50.0, 20.0  # the limits within which each must be refused


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, before: bytes = b"", pixels: bytes = zlib.compress(b"\0" * 100)) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zeros(mib: int, last: int = 0) -> bytes:
    """Compressed zeros: `mib` MiB and `last` bytes, compressed block by block."""
    packer = zlib.compressobj()
    return b"".join(packer.compress(bytes(_MIB)) for _ in range(mib)) + packer.compress(bytes(last)) + packer.flush()


def texts(count: int, kind: bytes, between: bytes) -> bytes:
    """PNG texts that each decompress to just below Pillow's limit."""
    packed = zeros(0, _MIB - 1)
    return b"".join(chunk(kind, b"k%d" % i + between + packed) for i in range(count))


def webp(width: int, height: int) -> bytes:
    """An animation whose canvas is far larger than its frame."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "WEBP", lossless=True)
    small = struct.pack("<I", 15)[:3]
    frame = bytes(6) + small + small + struct.pack("<I", 40)[:3] + b"\0" + buffer.getvalue()[12:]
    canvas = b"\x02\0\0\0" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(screen: int, frame: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HH", screen, screen) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<HHHH", 0, 0, frame, frame) + b"\0\x02\x02\x44\x01\0;"


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def tiff(side: int, tile: int = 0) -> bytes:
    """A grey picture in one compressed strip, or in one compressed tile of another size."""
    data = zeros(0, 100_000)[:100].ljust(100, b"\0")
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1}
    tags |= {322: tile, 323: tile, 324: 8, 325: 100} if tile else {273: 8, 278: side, 279: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 108) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def jpeg(side: int) -> bytes:
    """A small JPEG whose header claims another size."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def progressive(side: int, scans: int) -> bytes:
    """A grey JPEG of many scans; each takes about 8 bytes a million pixels, and the decoder a pass over all of them."""

    def segment(mark: int, data: bytes) -> bytes:
        return b"\xff" + bytes([mark]) + struct.pack(">H", len(data) + 2) + data

    blocks = (-(-side // 8)) ** 2
    one_code = bytes([1, *[0] * 15])
    head = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    tables = segment(0xC4, b"\x00" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\xe0")
    first = segment(0xDA, b"\1\1\0\0\0\0") + bytes(-(-blocks // 8))
    bits = ""
    while blocks > 0:  # runs of 16384 to 32767 empty blocks
        run = min(max(blocks, 16384), 32767)
        bits, blocks = bits + "0" + format(run - 16384, "014b"), blocks - run
    bits += "1" * (-len(bits) % 8)
    again = segment(0xDA, b"\1\1\0\1\x3f\0") + int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + head + tables + first + again * scans + b"\xff\xd9"


BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG of 30k x 30k": lambda: png(30_000, 30_000),
    "PNG of 2^31 x 2^31": lambda: png(2**31 - 1, 2**31 - 1),
    "PNG, 79 million pixels in 230 kB": lambda: png(8900, 8900, b"", zeros(226, 716_324)),
    "PNG with a text of 256 MiB": lambda: png(64, 64, chunk(b"zTXt", b"k\0\0" + zeros(256))),
    "PNG with 63 texts of a megabyte": lambda: png(64, 64, texts(63, b"zTXt", b"\0\0")),
    "PNG with 63 international texts": lambda: png(64, 64, texts(63, b"iTXt", b"\0\1\0\0\0")),
    "PNG with 5000 texts of a megabyte": lambda: png(64, 64, texts(5000, b"zTXt", b"\0\0")),
    "PNG with a profile of 256 MiB": lambda: png(64, 64, chunk(b"iCCP", b"k\0\0" + zeros(256))),
    "WebP with a canvas of 16k x 16k": lambda: webp(16_383, 16_383),
    "WebP with a canvas of 2^24 x 2^24": lambda: webp(1 << 24, 1 << 24),
    "GIF with a screen of 65k x 65k": lambda: gif(65_535, 1),
    "GIF with a frame of 65k x 65k": lambda: gif(16, 65_535),
    "BMP of 30k x 30k": lambda: bmp(30_000, 30_000),
    "BMP of 30k x 30k, upside down": lambda: bmp(30_000, -30_000),
    "TIFF of 30k x 30k": lambda: tiff(30_000),
    "TIFF of 64 x 64 with a tile of 30k x 30k": lambda: tiff(64, 30_000),
    "TIFF of 64 x 64 with a tile of 2^30 x 2^30": lambda: tiff(64, 1 << 30),
    "JPEG of 65k x 65k": lambda: jpeg(65_500),
    "JPEG of 16 million pixels in 5000 scans": lambda: progressive(3990, 5000),
}


def bomb(name: str) -> tuple[str, float, float]:
    """The error of `decode_image`, ms and MiB for a bomb; in a fork, to measure its peak of memory."""
    data = BOMBS[name]()
    reader, writer = os.pipe()
    if os.fork() == 0:
        _warm_up()
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        before, start = _peak_mib(), time.perf_counter()
        try:
            said = f"DECODED to {decode_image(data).size}"
        except ImageError as error:
            said = str(error)
        spent = (time.perf_counter() - start) * 1000
        os.write(writer, json.dumps([said, spent, _peak_mib() - before]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.wait()
    said, spent, grown = json.loads(answer) if answer else ["the process died", 0.0, 0.0]
    return said, spent, grown


def _warm_up() -> None:
    for format in FORMATS:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, format)
        decode_image(buffer.getvalue())


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def bomb_fault(said: str, spent: float, grown: float) -> str | None:
    """What is wrong with the answer to a bomb, or None."""
    if said.startswith(("DECODED", "the process died")):
        return said
    return f"{spent:.0f} ms, {grown:.0f} MiB" if spent > MS or grown > MIB else None
