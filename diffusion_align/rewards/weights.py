"""Weights of reward models: found or fetched, read without running anything in them, and held against what is due."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..system.network import offline
from .containers import require_container, require_plain


def locate(path: str, files: Sequence[str], repo: str, revision: str | None = None) -> Path:
    """The weights' file: `path` itself, one of `files` in the folder `path`, or the first of them from the hub.

    Raises:
        FileNotFoundError: none of them is there, or the hub does not give it; with the way out.
    """
    if not path:
        return hub_file(repo, files[0], revision)
    place = Path(path).expanduser()
    if place.is_file():
        return place
    found = [place / name for name in files if (place / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{place} holds none of {', '.join(files)}")
    return found[0]


def hub_file(repo: str, name: str, revision: str | None = None) -> Path:
    """A file of a repository on the hub, out of the cache where it is there; FileNotFoundError in one line."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # the hub's client raises a dozen kinds; each means that the file is not to be had
        at = f" --revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{name} of {repo} could not be fetched ({type(error).__name__}): {_cure()}; "
            f"`hf download {repo} {name}{at}` fetches it"
        ) from error


def web_file(url: str, sha256: str) -> Path:
    """A file from an address, kept in torch's cache; its bytes must be those of `sha256`. Raises as `hub_file` does."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{sha256[:16]}-{url.rpartition('/')[2]}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if offline():
                raise OSError("offline")
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except Exception as error:  # the network's errors, and RuntimeError for other bytes
            raise FileNotFoundError(f"{url} could not be fetched ({type(error).__name__}): {_cure()}") from error
    require_digest(path, sha256)
    return path


def _cure() -> str:
    if offline():
        return "HF_HUB_OFFLINE is set and it is not in the cache: unset it, or give a local path, NAME=PATH"
    return "check your connection, or fetch it by hand and give its path, NAME=PATH"


def require_digest(path: Path, sha256: str) -> None:
    """Raise ValueError unless the file is the one that is known under its name."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} is not the file that was published: its sha256 is {found}, not {sha256}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by key, on the CPU, from safetensors, or from torch's own format with nothing but tensors let in.

    A dictionary under `state_dict`, as of a training checkpoint, is taken for the whole.

    Raises:
        ValueError: it is damaged, holds code, or something else than tensors; with the first wrong key.
    """
    require_container(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # SafetensorError is no ValueError
            raise ValueError(f"{path} cannot be read as safetensors: {_short(error)}") from error
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError and more, all for bytes that are not weights
        raise ValueError(f"{path} is refused: it does not hold weights alone ({_short(error)})") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not tensors by key")
    for key, weight in loaded.items():
        if not isinstance(key, str) or not isinstance(weight, Tensor):
            raise ValueError(f"{path}: {str(key)[:80]!r} is a {type(weight).__name__}, not a tensor")
        require_plain(weight, key, path)
    return dict(loaded)


def _short(error: Exception) -> str:
    """An error's first words: torch's own advice to load such a file without protection is not passed on."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


def require_fit(weights: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], source: object) -> None:
    """Raise ValueError, with the first wrong key, unless the weights have these keys and shapes and are finite."""
    for key in weights:
        if key not in shapes:
            raise ValueError(
                f"{source}: unknown key {key[:200]!r} ({len(set(weights) - set(shapes))} of {len(weights)} are)"
            )
    for key, shape in shapes.items():
        if key not in weights:
            raise ValueError(
                f"{source}: key {key!r} is missing ({len(set(shapes) - set(weights))} of {len(shapes)} are)"
            )
        if tuple(weights[key].shape) != tuple(shape):
            raise ValueError(f"{source}: {key!r} has shape {list(weights[key].shape)}, not {list(shape)}")
        if not torch.isfinite(weights[key]).all():
            raise ValueError(f"{source}: {key!r} is not finite")


def fill(model: Any, weights: Mapping[str, Tensor], source: object, device: torch.device) -> Any:
    """Put weights into a model, exactly, and it on `device`, frozen and in eval mode; raises as `require_fit`."""
    require_fit(weights, {key: tuple(weight.shape) for key, weight in model.state_dict().items()}, source)
    model.load_state_dict(weights, strict=True)
    return model.to(device).eval().requires_grad_(False)


def place_of(device: str | torch.device | None) -> torch.device:
    """The device given, or a GPU where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
