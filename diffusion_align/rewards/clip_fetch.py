"""Weights that open_clip fetches by itself; where it cannot, one line with the command that fetches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..system.network import offline

T = TypeVar("T")


def fetch_command(name: str, pretrained: str | None) -> str | None:
    """What fetches a model of open_clip's into the hub's cache; None for one that lies on this disk."""
    if name.startswith("hf-hub:"):
        repo, _, revision = name.removeprefix("hf-hub:").partition("@")
        return f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    if name.startswith("local-dir:"):
        return None
    import open_clip

    at = open_clip.pretrained.get_pretrained_cfg(name, pretrained or "").get("hf_hub")
    return "hf download " + at.rstrip("/").replace("/", " ").replace(" ", "/", 1) if at else None


def fetched(name: str, pretrained: str | None, load: Callable[[], T]) -> T:
    """What `load` gives.

    Raises:
        FileNotFoundError: it could not be fetched; errors of a model on this disk pass as they are.
    """
    command = fetch_command(name, pretrained)
    if command is None:
        return load()
    try:
        return load()
    except Exception as error:  # open_clip's own errors and the dozen kinds of the hub's client
        when = "with HF_HUB_OFFLINE unset" if offline() else "when the hub answers"
        what = name.removeprefix("hf-hub:") + (f":{pretrained}" if pretrained else "")
        raise FileNotFoundError(
            f"{what} is not in the hub's cache and could not be fetched ({type(error).__name__}); "
            f"{when}, run `{command}`, or give a folder in open_clip's format"
        ) from error
