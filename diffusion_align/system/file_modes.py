"""File modes by the umask: safetensors makes its files readable for their owner only."""

from __future__ import annotations

from pathlib import Path


def readable(path: Path) -> None:
    """Give a file the mode that the umask of this process would give a new file."""
    probe = path.with_name(f".{path.name}.mode")  # os.umask can only be read by setting it, for all threads
    probe.touch()
    try:
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink()
