"""The model of a finished run: its base model and its trained weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.commands.adapters import kept_lora, merge_given, saved_lora_options
from diffusion_align.commands.model.base import base_fields
from diffusion_align.commands.sources import present_model
from diffusion_align.models.hub import on_hub
from diffusion_align.models.prompts.reading import Reading
from diffusion_align.options import read_yaml

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage

LORA_FILE = "pytorch_lora_weights.safetensors"


def run_config(run: str | Path) -> dict[str, Any]:
    """The resolved configuration of a run folder.

    Raises:
        FileNotFoundError: the folder has no config.yaml.
    """
    path = Path(run) / "config.yaml"
    if Path(run).is_file():
        raise FileNotFoundError(f"{run} is a file, not a run folder: --lora takes the file of a LoRA")
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.yaml")
    return read_yaml(path)


def base_of(
    run: str | Path, config: dict[str, Any], model: str | None = None, cure: str = "--model says where it is now"
) -> dict[str, Any]:
    """The `base_fields` of the model that a run started from, or of `model` in its place.

    Raises:
        FileNotFoundError: the model no longer exists; the message ends with `cure`.
    """
    base = base_fields(config.get("model") or {})
    if model is not None:  # the revision belongs to the run's own repository
        return base | {"pretrained_model_name_or_path": present_model(model), "revision": None}
    name = base["pretrained_model_name_or_path"] = present_model(base["pretrained_model_name_or_path"] or "")
    here = name == "tiny" or (name != "" and Path(name).expanduser().exists())
    if not here and not on_hub(name):
        raise FileNotFoundError(f"{run}: the model that it was trained from, {name or 'unnamed'}, is missing: {cure}")
    return base


def trained_at(config: dict[str, Any]) -> int | str | None:
    """The resolution of the training; None: the default of the model."""
    return (config.get("data") or {}).get("resolution")


def reading_of(o: Any, config: dict[str, Any]) -> Reading:
    """How prompts are read: as the options say, else as the run was trained, else as usual.

    `o` has the options long_prompts, prompt_chunks, prompt_syntax and clip_skip; in training none of them is None.
    """
    saved = config.get("text") or {}

    def chosen(name: str, usual: Any) -> Any:
        given = getattr(o, name)
        return saved.get(name, usual) if given is None else given

    long = chosen("long_prompts", "truncate")
    chunks = 1 if long == "truncate" else chosen("prompt_chunks", 3)
    return Reading(long, chunks, chosen("prompt_syntax", "plain"), chosen("clip_skip", 1))


def load_start(model: TextToImage, run: str | Path, config: dict[str, Any]) -> None:
    """Merge the LoRA that a run started from into the base model: what the run is compared with."""
    if (kept := kept_lora(Path(run), config)) is not None:
        merge_given(model, kept, saved_lora_options(config))


def load_tuned(model: TextToImage, run: str | Path) -> None:
    """Load the trained weights of a run, a LoRA or a full UNet, into its base model, and the LoRA that it started from
    if the run's file does not hold it.

    Raises:
        FileNotFoundError: the run has no trained weights (yet).
        ValueError: they are damaged, or belong to another base model.
    """
    from diffusion_align.models import load_lora, load_unet

    path, config = trained_weights(run), run_config(run)
    if (config.get("adapter") or {}).get("lora_mode") == "merge":
        load_start(model, run, config)
    if path.name == LORA_FILE:
        load_lora(model, run)
    else:
        load_unet(model, run)


def trained_weights(run: str | Path) -> Path:
    """The file or folder with the trained weights of a run; FileNotFoundError if there is none."""
    for name in (LORA_FILE, "unet"):
        if (Path(run) / name).exists():
            return Path(run) / name
    raise FileNotFoundError(
        f"{run} has no trained weights yet ({LORA_FILE} or unet/): let its training finish, "
        "or continue it with --resume_from_checkpoint latest"
    )


def weights_digest(run: str | Path, file: str | None = None) -> str:
    """A digest of a run's trained weights, or of one file of a folder."""
    path = Path(run) / file if file else trained_weights(run)
    digest = hashlib.blake2b(digest_size=8)
    for weights in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
        with weights.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
