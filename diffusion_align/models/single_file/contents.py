"""What is in a file of weights: names, shapes and precisions, without the weights; and the weights one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.system.printable import printable

if TYPE_CHECKING:
    from torch import Tensor

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "BOOL": 1, "U8": 1, "I8": 1}
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_LONGEST_HEADER = 100_000_000


class NotAModel(ValueError):
    """A file that holds no text-to-image model of these families. `kind` is what it is, a word of `kinds`."""

    def __init__(self, message: str, kind: str = "damaged"):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Entry:
    """Shape and precision of a tensor, in the words of safetensors: F32, F16, BF16, F8_E4M3 and so on."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """The tensors of a file by name, and its metadata."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_contents(path: Path) -> Contents:
    """The names, shapes and metadata of a safetensors file, from its header; of a pickled checkpoint without its code.

    Raises:
        NotAModel: the file is damaged, or neither of these.
    """
    with path.open("rb") as file:
        start = file.read(16)
    if kind := _mistaken(start):
        raise NotAModel(f"{path} is {kind[1]}", kind[0])
    if path.suffix.lower() in PICKLED:
        tensors = unpickled(path)
        named = {key: Entry(tuple(tensor.shape), _word(tensor)) for key, tensor in tensors.items()}
        return Contents(path, named, {})
    return _header(path, start)


def _mistaken(start: bytes) -> tuple[str, str] | None:
    """What a file is that only has the name of a model, by its first bytes."""
    if start.startswith(b"GGUF"):
        return "quantized", "a quantized model (GGUF), which cannot be trained: use its fp16 or fp32 safetensors file"
    if start.startswith(b"version https://"):
        return "damaged", "a pointer of Git LFS, not the file that it stands for: `git lfs pull` fetches that"
    if start.lstrip()[:1] == b"<":
        return "damaged", "a web page, not a model: the download went wrong; fetch the file again"
    return None


def _header(path: Path, start: bytes) -> Contents:
    size, length = path.stat().st_size, int.from_bytes(start[:8], "little")
    if start[:2] in (b"PK", b"\x80\x02"):
        raise NotAModel(f"{path} is a pickled checkpoint: rename it to {path.with_suffix('.ckpt').name}")
    if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise NotAModel(f"{path} is not a complete safetensors file: fetch it again")
    try:
        with path.open("rb") as file:
            file.seek(8)
            header: dict[str, Any] = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        entries = {key: Entry(tuple(value["shape"]), value["dtype"]) for key, value in header.items()}
        end = max((int(value["data_offsets"][1]) for value in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotAModel(f"{path} is not a safetensors file ({type(error).__name__}): fetch it again") from error
    if 8 + length + end != size:
        raise NotAModel(f"{path} is cut off: {8 + length + end:,} bytes are due and {size:,} are there; fetch it again")
    return Contents(path, entries, {str(key): str(value) for key, value in metadata.items()})


def unpickled(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a pickled checkpoint, which is read as data only: code in it does not run.

    Raises:
        NotAModel: it holds more than tensors, or is damaged.
    """
    import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch, zip files and pickles have errors of their own
        if type(error).__name__ == "UnpicklingError":
            raise NotAModel(
                f"{path} holds Python objects beside tensors, which loading would run as code: use its .safetensors "
                "file, or one that a program you trust has made of it"
            ) from error
        raise NotAModel(f"{path} could not be read ({' '.join(str(error).split())[:120]}): fetch it again") from error
    held = held.get("state_dict", held) if isinstance(held, dict) else {}
    return {key: value for key, value in held.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _word(tensor: Tensor) -> str:
    import torch

    words = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    integers = {torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
    return (words | integers).get(tensor.dtype, str(tensor.dtype).removeprefix("torch.").upper())


def tensor_reader(path: Path) -> Callable[[str], Tensor]:
    """A function that reads one tensor by name; a safetensors file is not read beyond it."""
    if path.suffix.lower() in PICKLED:
        return unpickled(path).__getitem__
    from safetensors import safe_open

    return safe_open(path, "pt").get_tensor


def shown(key: str) -> str:
    return printable(key)[:120]
