"""The options of `model inspect`, `model convert` and `model merge`."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass

from diffusion_align.vocabulary import PREDICTION_TYPES

from .names import UsageError
from .schema import option

FORMATS = ("folder", "single-file")
PATH = "a folder in diffusers format, a single file (.safetensors, .ckpt), a hub id, or tiny"


@dataclass(frozen=True)
class ModelInspect:
    # fmt: off
    pretrained_model_name_or_path: str | None = option(None, "model", PATH, aliases=("model",), path="name")
    # fmt: on


@dataclass(frozen=True)
class ModelConvert:
    # fmt: off
    pretrained_model_name_or_path: str | None = option(None, "model", PATH, aliases=("model",), path="name")
    revision: str | None = option(None, "model", "branch, tag or commit on the hub")
    variant: str | None = option(None, "model", "variant of the weights' files, such as fp16")
    pretrained_vae_model_name_or_path: str | None = option(None, "model", "another VAE: its file, its folder, the folder of a model that has it, or a hub id", path="name")
    prediction_type: str | None = option(None, "model", "what the network predicts, where its files do not tell it or are wrong (default: as they say)", choices=PREDICTION_TYPES)

    to: str = option("folder", "output", "a folder in diffusers format, or a single file as ComfyUI and A1111 read it", choices=FORMATS)
    dtype: str = option("fp16", "output", "precision of the written weights", choices=("fp32", "fp16", "bf16"))
    output_dir: str | None = option(None, "output", "the folder to write; a single file is written into it", path="folder")
    # fmt: on


@dataclass(frozen=True)
class ModelMerge(ModelConvert):
    # fmt: off
    lora: str | None = option(None, "model", "the LoRA to add: its file, or a run folder", path="in")
    scale: float = option(1.0, "model", "strength of the LoRA", aliases=("lora_scale",))
    # fmt: on


def check_model(options: ModelInspect | ModelConvert) -> None:
    """Check the options together.

    Raises:
        UsageError: no model, no LoRA, or nowhere to write.
    """
    verb = {ModelInspect: "inspect", ModelConvert: "convert", ModelMerge: "merge"}[type(options)]
    if options.pretrained_model_name_or_path is None:
        raise UsageError(f"which model? diffusion-align model {verb} PATH")
    if isinstance(options, ModelMerge) and options.lora is None:
        raise UsageError("which LoRA? --lora FILE")
    if isinstance(options, ModelConvert) and options.output_dir is None:
        raise UsageError("where to? --output_dir FOLDER")
