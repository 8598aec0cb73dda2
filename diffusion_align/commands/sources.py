"""Where pairs and prompts come from by name: the embedded ones, paths, and addresses on the hub."""

from __future__ import annotations

from pathlib import Path

from diffusion_align.models.hub import MOVED, asset, on_hub

# Pick-a-Pic's own address has not answered since 2025-04-30; this is a copy by others.
MOVED_DATA = {"yuvalkirstain/pickapic_v1": "pickapic-anonymous/pickapic_v1"}


def present_model(name: str) -> str:
    """A model's name, or its present address if published launchers have an old one."""
    return MOVED[name] if name in MOVED and not Path(name).exists() else name


def present_pairs(name: str) -> str:
    """A data set's name, or its present address if published launchers have an old one."""
    return MOVED_DATA[name] if name in MOVED_DATA and not Path(name).exists() else name


def pairs_on_disk(name: str, *, hub: bool = True) -> Path | None:
    """The path that a source of pairs means on this disk; None, where the `hub` may be asked, for a data set there."""
    if name == "tiny":
        return asset("tiny_pairs.parquet")
    path = Path(name).expanduser()
    return None if hub and not path.exists() and not path.suffix and on_hub(name) else path


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
        cure = f"`hf download {name} --repo-type dataset` fetches it; or give pairs on this disk with --train_data_dir"
        raise FileNotFoundError(f"pairs {name}: no such path here, and the hub says: {said}; {cure}") from error


def read_prompts(source: str) -> list[str]:
    """The prompts of a file, a folder, or a list that goes by a name (docs/evaluation.md).

    Raises:
        ValueError, FileNotFoundError: as `listed_prompts`.
    """
    from diffusion_align.commands.prompt_lists import listed_prompts  # which reads tables, for which few ask

    return [prompt.text for prompt in listed_prompts(source)]
