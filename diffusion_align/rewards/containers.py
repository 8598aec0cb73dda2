"""What a file of weights must look like from outside, and its tensors from inside, before anything believes them.

torch writes a zip of plain members beside one another. A member that is packed, stands twice, lies over another one or
leads elsewhere is nothing that torch wrote, and each is a known way to make a small file large or one file two.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

MAX_BYTES = 16 << 30  # the largest that is known here, a CLIP-H in float32, has 4 GB
MAX_MEMBERS = 100_000
MAX_PICKLE = 64 << 20  # keys and shapes; CLIP-H's have 0.1 MB


def require_container(path: Path) -> None:
    """Raise ValueError, in one line, where the file is too large, or a zip that torch would not have written."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} is refused: it has {size:,} bytes, over {MAX_BYTES:,}")
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is refused: a damaged zip ({' '.join(str(error).split())[:80]})") from error
    fault = _fault(members, size)
    if fault is not None:
        raise ValueError(f"{path} is refused: {fault}, which torch does not write")


def _fault(members: list[zipfile.ZipInfo], size: int) -> str | None:
    if len(members) > MAX_MEMBERS:
        return f"a zip of {len(members):,} members"
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        return f"a zip that holds {next(name for name in names if names.count(name) > 1)!r:.90} twice"
    for member in members:
        parts = member.filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or parts[0][1:2] == ":":
            return f"a zip with the path {member.filename!r:.90}"
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            return f"a zip whose member {member.filename!r:.90} is packed"
        if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE:
            return f"a zip with {member.file_size:,} bytes of keys"
    if sum(member.file_size for member in members) > size:
        return "a zip whose members lie over one another"
    return None


def require_plain(weight: Tensor, key: str, path: Path) -> None:
    """Raise ValueError unless a tensor is of the ordinary kind, and as large in the file as it says it is."""
    if weight.layout != torch.strided or weight.device.type != "cpu" or weight.is_quantized:
        kind = f"{weight.device.type}, {str(weight.layout).removeprefix('torch.')}"
        raise ValueError(f"{path}: {key[:80]!r} is no plain tensor ({kind})")
    if weight.numel() * weight.element_size() > weight.untyped_storage().nbytes():
        raise ValueError(f"{path}: {key[:80]!r} says it has {weight.numel():,} values, and the file has fewer")
