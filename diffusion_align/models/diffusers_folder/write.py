"""Writes a whole model as a folder in diffusers' format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, SchedulerMixin, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from diffusion_align.system.file_modes import readable

from ..pipeline import TextToImage


def write_folder(model: TextToImage, folder: Path, dtype: torch.dtype) -> Path:
    """Write a model in one precision, to which its networks are cast, completely or not at all. An existing folder is
    replaced."""
    common: dict[str, Any] = {
        "unet": _cast(model.unet, dtype),
        "vae": _cast(model.vae, dtype),
        "text_encoder": _cast(model.text_encoder, dtype),
        "tokenizer": model.tokenizer,
        "scheduler": _scheduler(model.scheduler),
    }
    if model.second is None:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline: Any = StableDiffusionPipeline(**common, **none)
    else:
        pipeline = StableDiffusionXLPipeline(
            **common,
            text_encoder_2=_cast(model.second.text_encoder, dtype),
            tokenizer_2=model.second.tokenizer,
            force_zeros_for_empty_prompt=model.second.zero_empty,
            add_watermarker=False,
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline.save_pretrained(partial)
        for path in partial.rglob("*"):
            if path.is_file():
                readable(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _cast(network: Any, dtype: torch.dtype) -> Any:
    """The network in this precision; diffusers' own `to` warns without a cause."""
    return nn.Module.to(network, dtype)


def _scheduler(config: Mapping[str, Any]) -> Any:
    """The scheduler of a configuration: its class if diffusers has it, else DDIM with the same noise levels."""
    named = getattr(diffusers, str(config.get("_class_name")), DDIMScheduler)
    kind = named if isinstance(named, type) and issubclass(named, SchedulerMixin) else DDIMScheduler
    return kind.from_config(dict(config))  # type: ignore[attr-defined]
