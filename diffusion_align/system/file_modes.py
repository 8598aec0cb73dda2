"""Files that others may read: safetensors makes its files for their owner's eyes only, whatever the umask says."""

from __future__ import annotations

from pathlib import Path


def readable(path: Path) -> None:
    """Give a file the mode that `open` would have given it, by the umask of this process."""
    probe = path.with_name(f".{path.name}.mode")  # to ask for the umask is to set it, for every thread
    probe.touch()
    try:
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink()
