"""The manifest of a checkpoint: size and sha256 of each of its files, under a sha256 of its own.

It is written last, so a directory that has one was complete; reading it checks every byte of every file.
"""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
_FILE = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or cannot be used; the message names the file."""


def write_manifest(folder: Path, step: int) -> None:
    """Seal every file of `folder` and sync the seal."""
    body = {"format": FORMAT, "step": step, "files": {file.name: _seal(file) for file in sorted(folder.iterdir())}}
    (folder / _FILE).write_text(_text(body), encoding="utf-8")
    sync(folder / _FILE)


def checked_files(path: Path, step: int) -> list[str]:
    """The names of a checkpoint's files, once each is known to be as it was written.

    Raises:
        CheckpointError: naming the file that is missing, changed or cannot be read.
    """
    file = path / _FILE
    try:
        body = _body(file)
        if body["format"] != FORMAT:
            raise CheckpointError(f"{file} has format {body['format']}, this version reads {FORMAT}")
        if body["step"] != step:
            raise CheckpointError(f"{file} is of step {body['step']}: the directory was renamed")
        seals = {name: (int(seal["size"]), str(seal["sha256"])) for name, seal in body["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} says nothing that this version understands") from error
    for name, (size, digest) in seals.items():
        _check(path, name, size, digest)
    return list(seals)


def sync(path: Path) -> None:
    """Have a file or directory on the disk, not only on its way there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a directory; a sync that fails for any other reason must not pass.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _body(file: Path) -> dict[str, Any]:
    if not file.is_file():  # nor a pipe, which would be waited for
        raise CheckpointError(f"{file} is missing")
    try:
        data = file.read_bytes()
        body = json.loads(data)["body"]
        whole = data == _text(body).encode()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged") from error
    # The text as a whole, so that not even a changed space passes.
    if not whole:
        raise CheckpointError(f"{file} is damaged")
    return body


def _check(path: Path, name: str, size: int, digest: str) -> None:
    part = path / name
    try:
        if Path(name).name != name or part.is_symlink() or not part.is_file():
            raise CheckpointError(f"{part} is missing")
        now = _seal(part)
    except OSError as error:
        raise CheckpointError(f"{part} cannot be read ({error.strerror})") from error
    if now["size"] != size:
        raise CheckpointError(f"{part} has {now['size']} bytes instead of {size}")
    if now["sha256"] != digest:
        raise CheckpointError(f"{part} is damaged (its sha256 differs)")


def _seal(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _text(body: Any) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({"body": body, "sha256": digest}, indent=1)
