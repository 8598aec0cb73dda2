"""Files of a cache that are whole or absent: a tensor, and beside it a JSON that is written after it and seals it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_align.system.file_modes import readable
from diffusion_align.data.raw_rows import DataError


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    staged = path.with_name(f".tmp-{path.name}")
    staged.write_bytes(data)
    os.replace(staged, path)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def known_shard(folder: Path, name: str) -> dict[str, Any] | None:
    """What is known of shard `name` where it is there whole; None also where its tensors do not match their seal."""
    seal, tensors = folder / f"{name}.json", folder / f"{name}.safetensors"
    if seal.is_file() and tensors.is_file():
        facts = json.loads(seal.read_text(encoding="utf-8"))
        if facts["sha256"] == sha256(tensors):
            return facts
    return None


def write_shard(folder: Path, name: str, values: Tensor, facts: dict[str, Any]) -> None:
    """Write tensors [N,...], and what is known of them as their seal. DataError for values that are not finite."""
    if not torch.isfinite(values).all():
        raise DataError(
            f"{name}: the encoder gave values that are not finite; encode in float32 (--encode_precision no; the SDXL "
            "VAE overflows in float16: load it in float32, or take madebyollin/sdxl-vae-fp16-fix)"
        )
    staged = folder / f".tmp-{name}.safetensors"
    save_file({"values": values.detach().cpu().contiguous()}, staged)
    readable(staged)
    facts = {"sha256": sha256(staged)} | facts
    os.replace(staged, folder / f"{name}.safetensors")
    write_bytes(folder / f"{name}.json", json.dumps(facts).encode())


class Shards:
    """Rows of finished shards by file and row. Every byte of a shard is checked when it is first touched."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, Any] = {}

    def row(self, name: str, row: int) -> Tensor:
        """Row `row` of shard `name`, as stored; DataError when the shard is missing or damaged."""
        if name not in self._open:
            tensors = self._folder / f"{name}.safetensors"
            # safetensors itself loads most flipped bits without a word.
            if (
                not tensors.is_file()
                or sha256(tensors) != json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))["sha256"]
            ):
                raise DataError(
                    f"{tensors}: is missing or damaged; delete {self._folder / 'manifest.json'} to encode it again"
                )
            self._open[name] = safe_open(tensors, framework="pt").get_slice("values")
        return self._open[name][row]
