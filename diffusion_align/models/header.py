"""The header of a safetensors file in one order, so that equal weights make equal files."""

from __future__ import annotations

import json
import os
from pathlib import Path

_LENGTH = 8  # bytes before the header, which say how long it is


def sort_header(path: Path) -> None:
    """Rewrite a file whose metadata safetensors wrote in an order that differs from process to process.

    Only `__metadata__` is sorted: it has the same bytes in another order, so nothing else moves. The file is replaced
    whole or not at all.
    """
    data = path.read_bytes()
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    header = json.loads(data[_LENGTH:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # Eight-byte alignment of the tensors, as safetensors keeps it; spaces may follow the JSON.
    text += b" " * (-len(text) % _LENGTH)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(len(text).to_bytes(_LENGTH, "little") + text + data[end:])
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
