"""Models as functions of tensors. Only this package imports diffusers, which takes seconds: names load lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import load_pipeline, set_attention
    from .lora.adapters import add_lora, trainable
    from .lora.merge import merge_lora
    from .lora.reference import reference
    from .lora.start import apply_start
    from .pipeline import TextToImage
    from .saved_weights import load_lora, load_unet, save_lora, save_unet, save_with_start

_MODULES = {
    "lora.adapters": ("add_lora", "trainable"),
    "lora.merge": ("merge_lora",),
    "lora.reference": ("reference",),
    "lora.start": ("apply_start",),
    "loading": ("load_pipeline", "set_attention"),
    "pipeline": ("TextToImage",),
    "saved_weights": ("load_lora", "load_unet", "save_lora", "save_unet", "save_with_start"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "TextToImage", "add_lora", "apply_start", "load_lora", "load_pipeline", "load_unet", "merge_lora", "reference",
    "save_lora", "save_unet", "save_with_start", "set_attention", "trainable",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
