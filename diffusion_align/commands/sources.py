"""Finds pairs, prompts and models by name: the embedded ones, paths on this disk, and repositories on the hub."""

from __future__ import annotations

from pathlib import Path

from diffusion_align.models.hub import MOVED, asset, on_hub

# Pick-a-Pic's own address has not answered since 2025-04-30; this is a copy by others.
MOVED_DATA = {"yuvalkirstain/pickapic_v1": "pickapic-anonymous/pickapic_v1"}


def present_model(name: str) -> str:
    """The name of a model, or its new hub id if its repository has moved."""
    return MOVED[name] if name in MOVED and not Path(name).exists() else name


def present_pairs(name: str) -> str:
    """The name of a data set, or its new hub id if its repository has moved."""
    return MOVED_DATA[name] if name in MOVED_DATA and not Path(name).exists() else name


def pairs_on_disk(name: str, *, hub: bool = True) -> Path | None:
    """The path of pairs on this disk; None if `hub` is true and `name` is a data set on the hub."""
    if name == "tiny":
        return asset("tiny_pairs.parquet")
    path = Path(name).expanduser()
    return None if hub and not path.exists() and not path.suffix and on_hub(name) else path


def read_prompts(source: str) -> list[str]:
    """The prompts of a file, a folder, or a named list (docs/evaluation.md).

    Raises:
        ValueError, FileNotFoundError: as `listed_prompts`.
    """
    from diffusion_align.commands.prompt_lists import listed_prompts  # here, as it imports readers of tables

    return [prompt.text for prompt in listed_prompts(source)]
