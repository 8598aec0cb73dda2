"""Flipped bits and truncated files in checkpoints: each must be refused by the file's name."""

import logging
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch

from diffusion_align.train.checkpoints.store import latest_good, save
from stress.checkpoint.kills import base, content, is_content


def flips(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """The data with one bit flipped, at `count` different places, or at all if there are fewer."""
    for bit in random.Random(seed).sample(range(8 * len(data)), min(count, 8 * len(data))):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def cuts(data: bytes, count: int | None = None, seed: int = 0) -> Iterator[bytes]:
    """The data truncated to every length, or to `count` different ones."""
    lengths = range(len(data))
    for length in lengths if count is None else random.Random(seed).sample(lengths, count):
        yield data[:length]


def refused(path: Path, damages: Iterator[bytes]) -> Counter[str]:
    """Replace a file of the newer of two checkpoints by each damaged version, and load. Counts:

    refused: a warning named the file, and the older checkpoint was loaded intact.
    unseen: the newer one was loaded as if undamaged.
    """
    weights = base(1000)
    data, said = path.read_bytes(), _Warnings()
    found: Counter[str] = Counter(damages=0, refused=0, unseen=0)
    said.logger.addHandler(said)
    try:
        for damage in damages:
            path.write_bytes(damage)
            said.lines.clear()
            loaded = latest_good(path.parent.parent)
            found["damages"] += 1
            found["unseen"] += loaded is not None and loaded.path == path.parent
            named = any(str(path) in line and "falling back" in line for line in said.lines)
            found["refused"] += named and loaded is not None and loaded.step == 1 and is_content(loaded, weights)
    finally:
        said.logger.removeHandler(said)
        path.write_bytes(data)
    return found


class _Warnings(logging.Handler):
    """Collects the package's warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.logger = logging.getLogger("diffusion_align.train.checkpoints.store")

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def two_checkpoints(folder: Path, parameters: int) -> Path:
    """A small checkpoint, and a newer one to be damaged."""
    save(folder, 1, *content(1, base(1000)))
    return save(folder, 2, *content(2, base(parameters)))


def silently_loaded(damages: Iterator[bytes]) -> Counter[str]:
    """How many of the damaged files safetensors alone loads."""
    found: Counter[str] = Counter(damages=0, unseen=0)
    for damage in damages:
        found["damages"] += 1
        try:
            safetensors.torch.load(damage)
        except safetensors.SafetensorError:
            continue
        found["unseen"] += 1
    return found
