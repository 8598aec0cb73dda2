"""Encoders one can compute by hand, and pairs that share pictures and prompts."""

import io
import time
from dataclasses import fields

import numpy as np
import torch
from PIL import Image

from diffusion_align import rng
from diffusion_align.data import EncodingSettings, build_cache
from diffusion_align.data.images import encode_png
from diffusion_align.data.pairs_and_rankings import Pair

SIZE = 16
SHAPE = (4, 4, 4)


class FakeModel:
    """Encoders whose answers are easy to compute by hand, which count what they are given and can fail on the way."""

    def __init__(self, name="fake", fail_at=None, pause=0.0):
        self.name, self.fail_at, self.pause = name, fail_at, pause
        self.pictures, self.prompts = 0, []

    def fingerprint(self):
        return self.name

    def latent_shape(self, resolution=None):
        return SHAPE

    @property
    def empty_text(self):
        return torch.full((1, 3, 2), -1.0)

    def encode_text(self, prompts):
        self.prompts += prompts
        return torch.stack([torch.full((3, 2), float(len(prompt))) for prompt in prompts])

    def encode_images(self, images, noise):
        self.pictures += len(images)
        time.sleep(self.pause)
        if self.fail_at is not None and self.pictures > self.fail_at:
            raise KeyboardInterrupt
        return mean(images) + noise / 100


def mean(images):
    """[B,3,SIZE,SIZE] -> [B,*SHAPE]: means over a 4 x 4 grid of blocks, and of the channels as the fourth one."""
    blocks = torch.nn.functional.adaptive_avg_pool2d(images, 4)
    return torch.cat([blocks, blocks.mean(1, keepdim=True)], 1)


def picture(i):
    return encode_png(rng.normal((3, SIZE, SIZE), 0, "picture", i).sigmoid())


def make_pairs(count=40, pictures=30, prompts=7):
    """Pairs that share pictures and prompts."""
    return [
        Pair(f"set:{i}", "p" * (1 + i % prompts), picture(7 * i % pictures), picture((7 * i + 1) % pictures))
        for i in range(count)
    ]


def build(folder, pairs, model=None, **options):
    options = {"resolution": SIZE, "pairs_per_shard": 8, "prompts_per_shard": 3, "progress": False} | options
    settings = {field.name: options.pop(field.name) for field in fields(EncodingSettings) if field.name in options}
    return build_cache(model or FakeModel(), pairs, folder, EncodingSettings(**settings), **options)


def upright(width, height):
    """A picture whose red grows to the right and whose green grows downwards."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.zeros_like(x)], -1).astype(np.uint8)


class Shaped(FakeModel):
    """Encoders whose latents are the means of blocks of 4 x 4 pixels, for pictures of any shape."""

    def latent_shape(self, resolution=None):
        return 4, resolution // 4, resolution // 4

    def encode_images(self, images, noise):
        self.pictures += len(images)
        blocks = torch.nn.functional.avg_pool2d(images, 4)
        return torch.cat([blocks, blocks.mean(1, keepdim=True)], 1) + noise / 100


def png(width, height, seed):
    level = rng.uniform_batch(0, "level", [(seed,)]).item()
    buffer = io.BytesIO()
    Image.fromarray((upright(width, height) * level).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shaped_pairs(count=24):
    sizes = [(64, 64), (96, 64), (64, 96), (64, 64), (128, 64)]
    return [Pair(str(i), "p", png(*sizes[i % 5], i), png(*sizes[i % 5], 100 + i)) for i in range(count)]
