"""Where pairs and prompts come from by name: the embedded ones, paths, and addresses on the hub."""

from __future__ import annotations

from pathlib import Path

from diffusion_align.models.hub import MOVED, asset

# Pick-a-Pic's own address has not answered since 2025-04-30; this is a copy by others.
MOVED_DATA = {"yuvalkirstain/pickapic_v1": "pickapic-anonymous/pickapic_v1"}


def present_model(name: str) -> str:
    """A model's name, or its present address if published launchers have an old one."""
    return MOVED[name] if name in MOVED and not Path(name).exists() else name


def present_pairs(name: str) -> str:
    """A data set's name, or its present address if published launchers have an old one."""
    return MOVED_DATA[name] if name in MOVED_DATA and not Path(name).exists() else name


def pairs_on_disk(name: str) -> Path | None:
    """The path that a source of pairs means on this disk; None for a data set on the hub."""
    if name == "tiny":
        return asset("tiny_pairs.parquet")
    path = Path(name).expanduser()
    # owner/name is an address on the hub where no such folder exists; any other word can only be a path.
    on_hub = not path.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.suffix
    return None if on_hub else path


def fetch_pairs(name: str, split: str, cache_dir: str | None) -> Path:
    """Download a data set's parquet files of one split and return the folder.

    Raises:
        FileNotFoundError: in one line, what the hub said, and how to go on without it.
    """
    from huggingface_hub import snapshot_download

    try:
        patterns = [f"*{split}*.parquet"]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns, cache_dir=cache_dir))
    except Exception as error:  # the hub's client raises errors of its own, of its HTTP library and of the system
        said = " ".join(str(error).split())[:200]
        cure = "give pairs on this disk with --train_data_dir"
        raise FileNotFoundError(f"pairs {name}: no such path here, and the hub says: {said}; {cure}") from error


def read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not blank; of a JSON list or JSON lines, the prompts.

    Raises:
        ValueError: not a text file in UTF-8, or no prompt in it.
    """
    if Path(path).suffix in (".json", ".jsonl", ".ndjson"):
        from diffusion_align.data.prompts import read_prompts as read_lists

        return read_lists(path)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8; give one prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; give one a line")
    return prompts
