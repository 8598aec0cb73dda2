"""Strict decoding of pictures from untrusted files.

A picture is decoded completely or refused with a reason. The header is checked before any pixel is decoded, and so are
packed texts, scans, tiles and pixels a byte, so a small file cannot ask for gigabytes, and a truncated file never
becomes a half-grey training picture.
"""

import io

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TILELENGTH, TILEWIDTH, TiffImageFile
from torch import Tensor

# Pillow also reads formats that start other programs (EPS) or that nobody trains on.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
# Below the 89.5 million at which Pillow itself starts to warn.
MAX_PIXELS = 80_000_000
MIN_SIDE = 8
# A flat PNG has about 340 pixels a byte, a photograph under 60; small flat pictures are no danger.
_LARGE, _PIXELS_A_BYTE = 16_000_000, 250
# Each packed text of a PNG may unpack to 1 MiB; usual files have a few.
_PACKED_TEXTS = 16
# A progressive JPEG decodes all its pixels in every scan; a megabyte may hold ten thousand scans, usual are 10.
_SCANNED = 2_000_000_000
# TIFF decodes complete tiles, whose size does not depend on the picture's.
_TILE = 4_194_304
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that turn a picture by 90 degrees
_PNG_MARKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")


class ImageError(ValueError):
    """A picture that cannot be used; the message is the reason, without the picture's name."""


def decode_image(data: bytes) -> Image.Image:
    """Decode bytes to an upright RGB picture.

    Transparent pixels are laid on white; 16-bit grey is scaled, not clipped; of an animation the first frame is taken.

    Raises:
        ImageError: empty, not a picture, truncated, more than MAX_PIXELS, or a side under MIN_SIDE pixels.
        RuntimeError: Pillow has been told in this process to accept truncated files.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on in this process, so broken pictures would be decoded half grey "
            "without a word; set it to False"
        )
    if not data:
        raise ImageError("is empty (0 bytes)")
    try:
        _check_texts(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            _check_cost(image, data)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"cannot be decoded (it is none of {', '.join(FORMATS)}, or its header is damaged)") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"has too many pixels (the limit is {MAX_PIXELS:,})") from error
    # Decoders raise OSError, SyntaxError, struct.error, zlib.error and more for bad bytes: all mean the same here.
    except Exception as error:
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})".replace("\n", " ")) from error


def size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height of the upright picture, in general from its header; None if it will be refused."""
    try:
        _check_texts(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if isinstance(image, TiffImageFile):  # some versions of Pillow have turned this size already
                width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
            _check_size(width, height)
            _check_cost(image, data)
            # Pillow decodes a PNG to find marks that may stand behind its pixels; most have none.
            unmarked = image.format == "PNG" and not any(mark in data for mark in _PNG_MARKS)
            turned = not unmarked and image.getexif().get(Base.Orientation) in _SIDEWAYS
    except Exception:  # decoders raise many kinds for bad bytes; decoding names the fault later
        return None
    return (height, width) if turned else (width, height)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"has too many pixels ({width} x {height}; the limit is {MAX_PIXELS:,})")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"is too small ({width} x {height}; the shorter side needs {MIN_SIDE} pixels)")


def _check_texts(data: bytes) -> None:
    """Before the file is opened, because Pillow unpacks them then."""
    texts = data.count(b"zTXt") + data.count(b"iTXt") if data.startswith(b"\x89PNG") else 0
    if texts > _PACKED_TEXTS:
        raise ImageError(f"has {texts:,} packed texts (the limit is {_PACKED_TEXTS}); save it without metadata")


def _check_cost(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse a picture whose header asks for too much work for so few bytes."""
    pixels = image.width * image.height
    if pixels > _LARGE and pixels > _PIXELS_A_BYTE * len(data):
        raise ImageError(f"has {pixels:,} pixels in {len(data):,} bytes, which no photograph or drawing has")
    if image.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) * pixels > _SCANNED:
        raise ImageError(f"has {scans:,} scans of {pixels:,} pixels; save it with the usual ten, or as a baseline JPEG")
    if isinstance(image, TiffImageFile):
        wide, high = image.tag_v2.get(TILEWIDTH, 0), image.tag_v2.get(TILELENGTH, 0)
        if wide * high > max(pixels, _TILE):
            raise ImageError(f"has tiles of {wide:,} x {high:,} pixels; save it without tiles")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # convert("RGB") would clip 16-bit grey at 255 and give a white picture.
        grey = np.asarray(image).astype(np.float64) / 65535.0
        if grey.min() < 0 or grey.max() > 1:
            raise ImageError("has integer pixels outside 16 bits")
        return Image.fromarray(np.round(grey * 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("has floating-point pixels, whose range is unknown; save it with 8 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def encode_png(picture: Tensor) -> bytes:
    """A picture [3,H,W] in [0, 1] as PNG bytes, rounded to 8 bits (exact for pictures that came from 8 bits)."""
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"a picture is [3,H,W], not {list(picture.shape)}")
    array = picture.detach().cpu().to(torch.float64).clamp(0, 1).mul(255).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
