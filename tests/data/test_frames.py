"""Aspect-ratio buckets, crops, mirror images and the sizes that SDXL is told: by hand, and on made pictures."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers_cache import Shaped, png, shaped_pairs, upright
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion_align import rng
from diffusion_align.data import EncodingSettings, build_cache
from diffusion_align.data.frames import (
    Frame,
    Frames,
    best_bucket,
    bucket_sizes,
    crop_box,
    fit,
    load_picture,
    lost,
    told_sizes,
)
from diffusion_align.data.images import decode_image, size_of
from diffusion_align.data.pairs_and_rankings import Pair

RATIOS = [
    "3:2", "4:3", "16:9", "1:1", "5:4", "21:9", "2:1", "7:5", "16:10", "3:1", "17:11", "13:10", "6:5", "9:8", "1.91:1",
]  # fmt: skip


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (1024, 64)])
def test_a_thousand_pictures_of_thirty_shapes_lose_few_pixels(resolution, step):
    ratios = [float(a) / float(b) for a, b in (text.split(":") for text in RATIOS)]
    ratios += [1 / ratio for ratio in ratios]
    assert len(ratios) == 30
    noise = rng.uniform_batch(0, "sizes", [(i,) for i in range(1000)]).tolist()
    total = kept = 0.0
    for i, u in enumerate(noise):
        height = 400 + round(2000 * u)
        size = round(height * ratios[i % 30]), height
        bucket = best_bucket([size], resolution, step)
        left, top, right, bottom = crop_box(size, Frame(*bucket))
        total, kept = total + size[0] * size[1], kept + (right - left) * (bottom - top)
        assert lost(size, bucket) == pytest.approx(1 - (right - left) * (bottom - top) / (size[0] * size[1]))
    assert 1 - kept / total < 0.05


def test_buckets_are_multiples_of_the_step_and_no_larger_than_the_square():
    sizes = bucket_sizes(512, 64)
    assert (512, 512) in sizes and (576, 384) in sizes and len(set(sizes)) == len(sizes)
    assert all(w % 64 == h % 64 == 0 and 0.7 <= w * h / 512**2 <= 1 and max(w, h) <= 4 * min(w, h) for w, h in sizes)
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert best_bucket([(512, 512)], 512, 64) == best_bucket([(90, 90), (1000, 1000)], 512, 64) == (512, 512)
    assert best_bucket([(300, 200), (300, 200)], 512, 64) == (576, 384)
    assert best_bucket([(300, 200), (200, 300)], 512, 64) == (
        512,
        512,
    )  # a third of each, not half of one
    with pytest.raises(ValueError, match="no bucket"):
        best_bucket([(1, 1)], 100, 101)


def test_a_square_frame_is_the_largest_square_in_the_middle():
    image = Image.fromarray(upright(40, 20))
    assert crop_box((40, 20), Frame(8, 8)) == (10, 0, 30, 20) and crop_box((20, 41), Frame(8, 8)) == (0, 10.5, 20, 30.5)
    by_hand = image.resize((10, 10), Image.Resampling.LANCZOS, box=(10, 0, 30, 20))
    expected = torch.from_numpy(np.array(by_hand)).permute(2, 0, 1) / 255
    assert torch.equal(fit(image, Frame(10, 10)), expected)
    assert torch.equal(fit(image, Frame(40, 20)), torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)


def test_crops_lie_where_the_frame_says_and_mirrors_are_exact():
    image = Image.fromarray(upright(64, 32))
    left, right = (fit(image, Frame(32, 32, x, 0.5))[0].mean() for x in (0.0, 1.0))
    assert float(left) < 0.26 and float(right) > 0.74
    plain, mirrored = (fit(image, Frame(48, 32, 0.2, 0.5, m)) for m in (False, True))
    assert plain.shape == (3, 32, 48) and torch.equal(mirrored, plain.flip(2))
    frames = Frame(8, 16), Frame(8, 16, 0.25, 1.0), Frame(512, 768, 0.123, 0.5, True), Frame(8, 8, 0.5, 0.5, True)
    for frame in frames:
        assert Frame.read(str(frame)) == frame
    with pytest.raises(ValueError, match="no frame"):
        Frame.read("8 by 8")


def test_what_sdxl_is_told_is_diffusers_convention():
    """original_size, crops_coords_top_left and target_size of StableDiffusionXLPipeline._get_add_time_ids, where the
    picture is first resized until it covers the target, as in diffusers' SDXL training scripts."""
    assert told_sizes((2000, 1000), Frame(512, 512)) == [1000, 2000, 0, 256, 512, 512]
    assert told_sizes((2000, 1000), Frame(512, 512, 0.0, 0.5)) == [1000, 2000, 0, 0, 512, 512]
    assert told_sizes((2000, 1000), Frame(512, 512, 0.0, 0.5, True)) == [1000, 2000, 0, 512, 512, 512]
    assert told_sizes((1000, 2000), Frame(512, 768)) == [2000, 1000, 128, 0, 768, 512]
    assert told_sizes((512, 768), Frame(512, 768)) == [768, 512, 0, 0, 768, 512]


XMP = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
# What a camera stores of the upright picture for each EXIF orientation.
STORED = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("where", ["exif", "xmp", "png", "png xmp", "late png", "tiff", "webp"])
def test_a_picture_has_one_orientation_whatever_way_it_came_in(tmp_path, orientation, where):
    """Through its bytes or its file, with the mark in EXIF or only in XMP, before or behind the pixels."""
    picture = upright(48, 24)
    image, buffer = Image.fromarray(np.ascontiguousarray(STORED[orientation](picture))), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    if where == "png":
        image.save(buffer, "PNG", exif=exif)
    elif where == "png xmp":
        texts = PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", (XMP % orientation).decode())
        image.save(buffer, "PNG", pnginfo=texts)
    elif where == "late png":
        image.save(buffer, "PNG")
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        whole, end = buffer.getvalue(), buffer.getvalue().index(b"IEND") - 4
        buffer = io.BytesIO(whole[:end] + chunk + whole[end:])
    elif where == "tiff":
        image.save(buffer, "TIFF", exif=exif)
    elif where == "webp":
        image.save(buffer, "WEBP", lossless=True, exif=exif)
    elif where == "exif":
        image.save(buffer, "JPEG", quality=100, subsampling=0, exif=exif)
    else:
        image.save(buffer, "JPEG", quality=100, subsampling=0, xmp=XMP % orientation)
    data = buffer.getvalue()
    (tmp_path / "picture").write_bytes(data)
    assert size_of(data) == (48, 24) == decode_image(data).size
    for source in (data, tmp_path / "picture"):
        found = load_picture(source, Frame(48, 24))
        assert (found * 255 - torch.from_numpy(picture).permute(2, 0, 1)).abs().max() < (
            12 if where in ("exif", "xmp") else 1
        )


def test_the_size_of_what_is_no_picture_is_unknown():
    assert size_of(b"") is None and size_of(b"\x89PNG\r\n\x1a\nbroken") is None
    assert size_of(png(4, 64, 1)) is None and size_of(png(64, 64, 1) + b"zTXt" * 17) is None  # decoding refuses these


def build(folder, pairs, model=None, **settings):
    frames = Frames(32, step=8, **settings)
    return build_cache(
        model or Shaped(), pairs, folder, EncodingSettings(32, 3, pairs_per_shard=7, frames=frames), progress=False
    )


def test_each_pair_is_encoded_in_its_bucket_once(tmp_path):
    pairs, model = shaped_pairs(), Shaped()
    cache = build(tmp_path, pairs, model, buckets=True)
    assert model.pictures == 48 == cache.pictures and cache.variants == 1
    shapes = [cache.shape(i) for i in range(24)]
    assert shapes[:5] == ["32x32", "40x24", "24x40", "32x32", "40x24"]
    for i in (0, 1, 2, 4, 23):
        latents, _ = cache.batch([i])
        frame = Frame.read(shapes[i])
        assert latents.shape == (1, 2, 4, frame.height // 4, frame.width // 4)
        clean = Shaped().encode_images(load_picture(pairs[i].winner, frame)[None], torch.zeros(()))[0]
        assert (latents[0, 0] - clean).abs().max() < 0.06  # five deviations of the noise
    assert cache.groups is not None and [len(set(cache.groups)), len(cache.groups)] == [3, 24]
    with pytest.raises(ValueError, match="one shape"):
        cache.batch([0, 1])
    assert build(tmp_path, pairs, model, buckets=True).groups == cache.groups and model.pictures == 48
    assert build(tmp_path, pairs, model).groups is None  # squares are another cache
    assert model.pictures == 96


def test_crops_and_mirror_images_are_alike_in_both_pictures_of_a_pair(tmp_path):
    pairs, model = shaped_pairs(10), Shaped()
    cache = build(tmp_path, pairs, model, crops=2, mirrored=True)
    assert cache.variants == 4 and model.pictures == 80 and cache.groups is None and cache.lengths == [2] * 10
    both = [cache.batch([1], [variant])[0][0] for variant in range(4)]
    places = [cache.told([1], [variant])[0].tolist() for variant in range(4)]
    assert places[0][0] == places[0][1] and places[0] != places[1]  # the same crop of both, another one in variant 1
    for plain, mirrored in ((0, 2), (1, 3)):
        assert (both[plain].flip(3) - both[mirrored]).abs().max() < 0.12  # each with noise of its own
    # The crop that was told is the crop that was made: 96 x 64 resized to 48 x 32, of which 32 x 32 is taken.
    left = places[0][0][3]
    resized = Image.open(io.BytesIO(pairs[1].winner)).convert("RGB").resize((48, 32), Image.Resampling.LANCZOS)
    clean = fit(resized.crop((left, 0, left + 32, 32)), Frame(32, 32))
    assert (both[0][0] - Shaped().encode_images(clean[None], torch.zeros(()))[0]).abs().max() < 0.08
    with pytest.raises(ValueError, match="no sizes"):
        build_cache(Shaped(), pairs, tmp_path, EncodingSettings(32), progress=False).told([0])


def test_broken_pictures_are_named_once_however_many_crops_there_are(tmp_path):
    pairs = [
        *shaped_pairs(5),
        Pair("bad", "p", b"no picture", png(64, 64, 7)),
        Pair("cut", "p", png(64, 64, 1)[:90], b""),
    ]
    frames = Frames(32, True, 8, 3, True)
    cache = build_cache(
        Shaped(), pairs, tmp_path, EncodingSettings(32, frames=frames), progress=False, max_bad_fraction=1.0
    )
    assert cache.kept == [0, 1, 2, 3, 4] and cache.bad == 2
    (listed,) = tmp_path.glob("*/bad_rows.jsonl")
    text = listed.read_text()
    assert text.count("cannot be decoded") == 2 and text.count("\n") == 2
