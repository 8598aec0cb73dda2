"""The manifest of a checkpoint: size and sha256 of each of its files, and a sha256 of these.

It is written last, so a directory with a manifest was complete; reading it verifies every byte of every file.
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
    """A checkpoint could not be written or cannot be used; the message names the file."""


def write_manifest(folder: Path, step: int) -> None:
    """Write and sync the manifest of all files in `folder`."""
    body = {"format": FORMAT, "step": step, "files": {file.name: _measure(file) for file in sorted(folder.iterdir())}}
    (folder / _FILE).write_text(_text(body), encoding="utf-8")
    sync(folder / _FILE)


def checked_files(path: Path, step: int) -> list[str]:
    """The names of a checkpoint's files, after verifying each of them.

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
        files = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in body["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has a content that this version cannot read") from error
    for name, (size, digest) in files.items():
        _check(path, name, size, digest)
    return list(files)


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a directory; every other failure is an error.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _body(file: Path) -> dict[str, Any]:
    if not file.is_file():  # reading a pipe would block
        raise CheckpointError(f"{file} is missing")
    try:
        data = file.read_bytes()
        body = json.loads(data)["body"]
        intact = data == _text(body).encode()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged") from error
    # The complete text is compared, so even a changed space is noticed.
    if not intact:
        raise CheckpointError(f"{file} is damaged")
    return body


def _check(path: Path, name: str, size: int, digest: str) -> None:
    file = path / name
    try:
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file} is missing")
        now = _measure(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    if now["size"] != size:
        raise CheckpointError(f"{file} has {now['size']} bytes instead of {size}")
    if now["sha256"] != digest:
        raise CheckpointError(f"{file} is damaged (its sha256 differs)")


def _measure(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _text(body: Any) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({"body": body, "sha256": digest}, indent=1)
