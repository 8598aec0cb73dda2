"""Which files of a component's folder hold its weights: plain or a variant (fp16), safetensors or pickled."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Taken where nothing else is there, as they hold the same network. Others (non_ema) are another one, and are asked for.
HALF = ("fp16", "bf16")
_NAME = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?"
    r"(?:\.(?P<after>[\w-]+))?\.(?P<kind>safetensors|bin)"
)


class NoWeights(FileNotFoundError):
    """A component's folder holds no weights, or only variants that must be asked for: `variants`."""

    def __init__(self, message: str, variants: Iterable[str] = ()):
        super().__init__(message)
        self.variants = tuple(variants)


@dataclass(frozen=True)
class Weights:
    """The files of a component's weights. `variant` None: the plain ones."""

    variant: str | None
    safetensors: bool
    files: tuple[Path, ...]


def weights_in(folder: Path) -> dict[tuple[str | None, bool], list[Path]]:
    """{(variant, whether safetensors): files} of a component's folder."""
    found: dict[tuple[str | None, bool], list[Path]] = {}
    for path in sorted(folder.glob("*")):
        if match := _NAME.fullmatch(path.name):
            variant = match["variant"] or match["after"]
            found.setdefault((variant, match["kind"] == "safetensors"), []).append(path)
    return found


def choose_weights(folder: Path, wanted: str | None = None) -> Weights:
    """The weights to read: the wanted variant, else the plain ones, else those in half precision; safetensors first.

    Raises:
        NoWeights: there are none, or only variants of another kind.
    """
    found = weights_in(folder)
    for safe in (True, False):
        for variant in dict.fromkeys((wanted, None, *HALF)):
            if (variant, safe) in found:
                return Weights(variant, safe, tuple(found[variant, safe]))
    others = sorted({variant for variant, _ in found if variant})
    if others:
        raise NoWeights(f"{folder} has weights only in the variant {' or '.join(others)}, which must be given", others)
    raise NoWeights(f"{folder} is incomplete: it has no weights; fetch the model again")


def require_variant(folder: Path, components: Iterable[str], wanted: str | None) -> None:
    """Raise NoWeights if no component has the variant that was asked for."""
    there = {variant for name in components for variant, _ in weights_in(folder / name)}
    if wanted is not None and wanted not in there:
        known = sorted(variant for variant in there if variant)
        rest = f"there are {', '.join(known)}" if known else "there are only plain ones: leave the variant out"
        raise NoWeights(f"{folder} has no weights in the variant {wanted}; {rest}", known)
