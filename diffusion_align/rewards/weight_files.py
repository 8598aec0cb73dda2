"""Files of reward models' weights: located or fetched, checked, read without running any code in them.

torch writes a zip of uncompressed members, one after another. A member that is compressed, duplicated, overlaps another
one or leads outside was not written by torch; each is a known way to make a small file large or to hide a second file.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..system.network import offline

MAX_BYTES = 16 << 30  # the largest known file, a CLIP-H in float32, has 4 GB
MAX_MEMBERS = 100_000
MAX_PICKLE = 64 << 20  # keys and shapes; CLIP-H's have 0.1 MB


def locate(path: str, files: Sequence[str], repo: str, revision: str | None = None) -> Path:
    """The file of weights: `path` itself, one of `files` in the folder `path`, or the first of them from the hub.

    Raises:
        FileNotFoundError: the folder has none of them, or the hub does not give it; with what to do.
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
    """A file of a repository on the hub, from the cache if it is there; raises FileNotFoundError."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # the hub's client raises a dozen kinds, all for a file that it cannot give
        at = f" --revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{name} of {repo} could not be fetched ({type(error).__name__}): {_advice()}; "
            f"`hf download {repo} {name}{at}` fetches it"
        ) from error


def web_file(url: str, sha256: str) -> Path:
    """A file from an address, kept in torch's cache and checked against `sha256`; raises as `hub_file` does."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{sha256[:16]}-{url.rpartition('/')[2]}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if offline():
                raise OSError("offline")
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except Exception as error:  # network errors, and RuntimeError for a wrong digest
            raise FileNotFoundError(f"{url} could not be fetched ({type(error).__name__}): {_advice()}") from error
    require_digest(path, sha256)
    return path


def _advice() -> str:
    if offline():
        return "HF_HUB_OFFLINE is set and it is not in the cache: unset it, or give a local path, NAME=PATH"
    return "check your connection, or fetch it by hand and give its path, NAME=PATH"


def require_digest(path: Path, sha256: str) -> None:
    """Raise ValueError unless the file has this digest."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} is not the file that was published: its sha256 is {found}, not {sha256}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by key, on the CPU, from safetensors or from torch's own format, which may contain only tensors.

    Of a training checkpoint, the dictionary under `state_dict` is returned.

    Raises:
        ValueError: the file is damaged, or contains code or anything but tensors; with the first wrong key.
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
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError and more
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
    """The first words of an error, without torch's advice to load such a file unprotected."""
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
    """The model with exactly these weights, on `device`, frozen and in eval mode; raises as `require_fit` does."""
    require_fit(weights, {key: tuple(weight.shape) for key, weight in model.state_dict().items()}, source)
    model.load_state_dict(weights, strict=True)
    return model.to(device).eval().requires_grad_(False)


def require_container(path: Path) -> None:
    """Raise ValueError if the file is too large, or is a zip that torch would not have written."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} is refused: it has {size:,} bytes, over {MAX_BYTES:,}")
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is refused: a damaged zip ({' '.join(str(error).split())[:80]})") from error
    fault = _fault(members, size)
    if fault is not None:
        raise ValueError(f"{path} is refused: {fault}, which torch does not write")


def _fault(members: list[zipfile.ZipInfo], size: int) -> str | None:
    if len(members) > MAX_MEMBERS:
        return f"a zip of {len(members):,} members"
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        return f"a zip that holds {next(name for name in names if names.count(name) > 1)!r:.90} twice"
    for member in members:
        parts = member.filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or parts[0][1:2] == ":":
            return f"a zip with the path {member.filename!r:.90}"
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            return f"a zip whose member {member.filename!r:.90} is packed"
        if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE:
            return f"a zip with {member.file_size:,} bytes of keys"
    if sum(member.file_size for member in members) > size:
        return "a zip whose members lie over one another"
    return None


def require_plain(weight: Tensor, key: str, path: Path) -> None:
    """Raise ValueError unless a tensor is dense, on the CPU, and its values are in the file."""
    if weight.layout != torch.strided or weight.device.type != "cpu" or weight.is_quantized:
        kind = f"{weight.device.type}, {str(weight.layout).removeprefix('torch.')}"
        raise ValueError(f"{path}: {key[:80]!r} is no plain tensor ({kind})")
    if weight.numel() * weight.element_size() > weight.untyped_storage().nbytes():
        raise ValueError(f"{path}: {key[:80]!r} says it has {weight.numel():,} values, and the file has fewer")
