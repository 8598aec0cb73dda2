"""The options of `export`."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass

from diffusion_align.vocabulary import PREDICTION_TYPES

from .names import UsageError
from .schema import option

LORA_TARGETS = ("kohya", "comfyui", "peft")  # formats of a LoRA only
TARGETS = ("diffusers", *LORA_TARGETS, "merged", "single-file")
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Export:
    # fmt: off
    run: str | None = option(None, "model", "run folder, a checkpoint in it (RUN/checkpoints/step-...), or a LoRA file with --model", path="in")
    pretrained_model_name_or_path: str | None = option(None, "model", "the model that it was trained from (default: the one in the run's configuration)", aliases=("model",), path="name")
    revision: str | None = option(None, "model", "branch, tag or commit of that model on the hub")
    variant: str | None = option(None, "model", "variant of that model's weight files, such as fp16")

    pretrained_vae_model_name_or_path: str | None = option(None, "model", "another VAE: its file, its folder, the folder of a model that has it, or a hub id (default: the run's)", path="name")
    prediction_type: str | None = option(None, "model", "what the model predicts, where its files do not tell it or are wrong (default: the run's)", choices=PREDICTION_TYPES)
    alpha: float | None = option(None, "model", "alpha of a LoRA file that does not tell it", aliases=("network_alpha", "lora_alpha"), above=0)

    to: str | None = option(None, "export", "format: diffusers, kohya, comfyui or peft for a LoRA; merged (a diffusers folder of the whole model) or single-file (a checkpoint) with the LoRA in the weights (docs/export.md)", choices=TARGETS)
    dtype: str = option("fp32", "export", "precision of the tensors", choices=("fp32", "fp16", "bf16"))
    output: str | None = option(None, "output", "file or folder to write; in an existing folder, a file gets a name of its own (default: exports/NAME-TO-DTYPE)", path="output")
    overwrite: bool = option(False, "output", "replace an earlier export there", saved=False)
    # fmt: on


def check_export(options: Export) -> None:
    """Check the options together.

    Raises:
        UsageError: no run, or no format.
    """
    if options.run is None:
        raise UsageError("which run? diffusion-align export RUN_FOLDER --to FORMAT")
    if options.to is None:
        raise UsageError(f"to which format? --to {', '.join(TARGETS)}")
