"""Strict decoding: every byte string is either a whole upright RGB picture or an ImageError with its reason."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.transforms import v2

from diffusion_align.data.frames import Frame, fit, load_picture
from diffusion_align.data.images import ImageError, decode_image, encode_png


def smooth(width=60, height=40):
    """A picture that changes slowly, so that any decent resize agrees about it."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_picture_of_the_right_size_passes_unchanged():
    array = smooth(32, 32)
    picture = load_picture(encoded(array), 32)
    assert picture.shape == (3, 32, 32) and picture.dtype == torch.float32
    assert torch.equal(picture, torch.from_numpy(array).permute(2, 0, 1).float() / 255)
    assert torch.equal(load_picture(encode_png(picture), 32), picture)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (200, 70)])
def test_crop_and_resize_agree_with_torchvision(size):
    image = Image.fromarray(smooth(*size))
    theirs = v2.Compose(
        [v2.Resize(32, antialias=True), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, True)]
    )
    difference = (fit(image, Frame(32, 32)) - theirs(image)).abs()
    assert difference[:, 2:-2, 2:-2].max() < 4 / 255 and difference.mean() < 1 / 255


def test_a_long_strip_is_cropped_before_it_is_resized(monkeypatch):
    strip = encoded(Image.new("RGB", (20_000, 8), (10, 20, 30)))
    made, resize = [], Image.Image.resize

    def counted(image, size, *args, **kwargs):
        made.append(size[0] * size[1])
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", counted)
    assert torch.allclose(load_picture(strip, 512)[:, 0, 0], torch.tensor([10, 20, 30]) / 255)
    assert made and max(made) <= 512 * 512  # resized first, this would be 512 x 1,280,000


def test_exif_orientation_turns_the_picture_upright():
    array = smooth(40, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side, to be turned by 90 degrees clockwise
    turned = np.asarray(decode_image(encoded(array, exif=exif)))
    assert np.array_equal(turned, np.rot90(array, k=-1))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (9, 9), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (9, 9), 1), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (9, 9), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (9, 9), (255, 0, 0, 255)), "PNG", (255, 0, 0)),
        (Image.new("LA", (9, 9), (10, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGB", (9, 9), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE), "PNG", (1, 2, 3)),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.fromarray(np.full((9, 9), 32768, np.uint16)), "PNG", (128, 128, 128)),
    ],
    ids=["grey", "bits", "clear", "opaque", "grey-clear", "palette", "cmyk", "16-bit"],
)
def test_modes(image, kind, expected):
    decoded = decode_image(encoded(image, kind))
    assert decoded.mode == "RGB" and decoded.getpixel((4, 4)) == expected


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    assert decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (
        255,
        0,
        0,
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_truncated_picture_is_decoded(kind):
    data = encoded(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8), kind)
    for length in range(0, len(data) * 9 // 10, max(1, len(data) // 60)):
        with pytest.raises(ImageError):
            decode_image(data[:length])


def test_the_usual_cure_for_truncated_pictures_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="set it to False"):
        decode_image(encoded(smooth()))


@pytest.mark.parametrize("size", [(12_000, 12_000), (30_000, 30_000), (9_000, 9_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header(size, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("pixels were asked for"))
    with pytest.raises(ImageError, match="too many pixels"):
        decode_image(png_header(*size))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
        (
            encoded(Image.new("RGB", (9, 9)), "PPM"),
            "cannot be decoded",
        ),  # Pillow reads it; the allow-list does not hold it
        (encoded(Image.new("RGB", (300, 1))), "too small .300 x 1;"),
        (encoded(Image.new("F", (9, 9)), "TIFF"), "floating-point"),
    ],
)
def test_a_refusal_gives_the_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode_image(data)


def test_fuzzed_bytes_are_used_or_refused():
    """600 pictures with a few bytes changed, cut or repeated: never another exception."""
    chance = random.Random(1)
    originals = [encoded(smooth(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    outcomes = []
    for trial in range(600):
        data = bytearray(originals[trial % len(originals)])
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.3:
            data = data[: chance.randrange(len(data))]
        try:
            outcomes.append(load_picture(bytes(data), 16).shape == (3, 16, 16))
        except ImageError as error:
            assert "\n" not in str(error)
    assert all(outcomes) and 100 < len(outcomes) < 600
