"""Shards of a cache: what is encoded, which rank encodes which shard, and their files, which are complete or absent."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.disk import sha256, write_bytes
from diffusion_align.data.frames import Frames
from diffusion_align.data.pairs_and_rankings import Pair, Ranking
from diffusion_align.system.file_modes import readable

VALUES = "values"  # the key of a shard's tensor, if it has one


class NotFinite(DataError):
    """An encoder gave values that are not finite."""


class Encoders(Protocol):
    """What a cache needs of a model (models.TextToImage has it)."""

    @property
    def empty_text(self) -> Tensor: ...
    def fingerprint(self) -> str: ...
    def latent_shape(self, resolution: int | str | None = None) -> tuple[int, int, int]: ...
    def encode_text(self, prompts: list[str]) -> Tensor: ...
    def encode_images(self, images: Tensor, noise: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class EncodingSettings:
    """How pictures and prompts are encoded. All of it is part of a cache's identity.

    Attributes:
        dtype: precision on disk; batches are float32 in any case.
        precision: what the encoders compute in; "no" is float32. The caller opens the autocast.
        frames: how pictures are cropped; None crops the largest square in the middle.
    """

    resolution: int | str
    seed: int = 0
    dtype: torch.dtype = torch.float32
    precision: str = "no"
    pairs_per_shard: int = 1024
    prompts_per_shard: int = 1024
    frames: Frames | None = None


@dataclass(frozen=True)
class Ranks:
    """Which rank this process is, and of how many. `total(n)` waits for all ranks and gives the sum of their n."""

    rank: int = 0
    count: int = 1
    total: Callable[[int], int] = lambda n: n


@dataclass(frozen=True)
class EncodingJob:
    """The pairs or rankings to encode, and the folder for their encodings."""

    model: Encoders
    lists: Sequence[Pair] | Sequence[Ranking]
    home: Path
    settings: EncodingSettings
    ranks: Ranks
    prompts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", list(dict.fromkeys(entry.prompt for entry in self.lists)))

    @property
    def kind(self) -> str:
        return "ranking" if isinstance(self.lists[0], Ranking) else "pair"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.model.latent_shape(self.settings.resolution)

    @property
    def variants(self) -> int:
        """How many times each picture is encoded."""
        return self.settings.frames.variants if self.settings.frames else 1

    @property
    def list_shards(self) -> range:
        return range(-(-len(self.lists) // self.settings.pairs_per_shard))

    @property
    def text_shards(self) -> range:
        return range(-(-len(self.prompts) // self.settings.prompts_per_shard))

    def mine(self, shards: range) -> range:
        """Those of some shards that this rank encodes."""
        return shards[self.ranks.rank :: self.ranks.count]

    def rows(self, shard: int) -> range:
        """The indices of a shard's pairs or rankings."""
        first = shard * self.settings.pairs_per_shard
        return range(first, min(first + self.settings.pairs_per_shard, len(self.lists)))

    def texts(self, shard: int) -> list[str]:
        """The prompts of a shard."""
        return self.prompts[shard * self.settings.prompts_per_shard :][: self.settings.prompts_per_shard]

    def name(self, shard: int) -> str:
        """The names of a shard's files without their suffixes."""
        return f"{self.kind}s-{shard:05d}"

    def size(self) -> int:
        """Bytes of all encodings at most: pictures that are equal only by their bytes are not known before they are
        read."""
        every = [picture for entry in self.lists for picture in entry.pictures]
        # Random crops are those of a list, so a picture of two lists is cropped for each.
        pictures = len(every) if self.settings.frames and self.settings.frames.crops else len(set(every))
        numbers = (
            pictures * self.variants * math.prod(self.latent_shape)
            + (len(self.prompts) + 1) * self.model.empty_text.numel()
        )
        return numbers * self.settings.dtype.itemsize


def finished_shard(folder: Path, name: str) -> dict[str, Any] | None:
    """The facts about shard `name` if it is finished; None also if its tensors do not match the checksum in them."""
    facts_path, tensors = folder / f"{name}.json", folder / f"{name}.safetensors"
    if facts_path.is_file() and tensors.is_file():
        facts = json.loads(facts_path.read_text(encoding="utf-8"))
        if facts["sha256"] == sha256(tensors):
            return facts
    return None


def write_shard(folder: Path, name: str, values: Tensor | Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors [N,...], by key if their shapes differ, and then the facts about them, which finish the shard.
    NotFinite if they are not."""
    tensors = {VALUES: values} if isinstance(values, Tensor) else values
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise NotFinite(
            f"{name}: the encoder gave values that are not finite (the SDXL VAE overflows in float16: load it in "
            "float32, or take madebyollin/sdxl-vae-fp16-fix)"
        )
    staged = folder / f".tmp-{name}.safetensors"
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, staged)
    readable(staged)
    facts = {"sha256": sha256(staged)} | facts
    os.replace(staged, folder / f"{name}.safetensors")
    write_bytes(folder / f"{name}.json", json.dumps(facts).encode())


class Shards:
    """Tensors of finished shards, by shard and row. Every byte of a shard is checked when it is first read."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, Any] = {}

    def row(self, name: str, row: int, key: str = VALUES) -> Tensor:
        """Row `row` of a tensor of shard `name`, as stored; DataError if the shard is missing or damaged."""
        if name not in self._open:
            tensors = self._folder / f"{name}.safetensors"
            # safetensors itself loads most flipped bits without an error.
            if (
                not tensors.is_file()
                or sha256(tensors) != json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))["sha256"]
            ):
                raise DataError(
                    f"{tensors}: is missing or damaged; delete {self._folder / 'manifest.json'} to encode it again"
                )
            file = safe_open(tensors, framework="pt")
            self._open[name] = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
        return self._open[name][key][row]
