"""Options of a trained LoRA, or another adapter, that a model gets first."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from diffusion_align.vocabulary import LORA_TARGETS

from .names import UsageError
from .schema import option


@dataclass(frozen=True)
class GivenLora:
    # fmt: off
    lora: str | None = option(None, "adapter", "a trained LoRA, or another adapter, that the model gets first, with its layers for text encoders: a file, a folder of peft, or a run (docs/adapters.md)", path="in")
    lora_partial: bool = option(False, "adapter", "of --lora, take the layers that the model has, where the file has more or less than these; a warning lists the others")
    lora_file_alpha: float | None = option(None, "adapter", "alpha of --lora, where the file does not tell it (a file of peft without its adapter_config.json)", above=0)
    # fmt: on


@dataclass(frozen=True)
class NewLora:
    """The LoRA that a training adds, from the options of these names."""

    rank: int
    network_alpha: float | None = None
    lora_targets: str = "attention"
    use_dora: bool = False
    use_rslora: bool = False

    @classmethod
    def of(cls, options: Any) -> NewLora:
        """From a record of options, or the section "adapter" of a saved configuration, which may lack newer ones."""
        found = options if isinstance(options, dict) else vars(options)
        return cls(**{field.name: found[field.name] for field in fields(cls) if field.name in found})

    @property
    def alpha(self) -> float:
        """The alpha of the plain LoRA of this strength: rsLoRA's is alpha / sqrt(rank) (Kalajdzievski 2023, arXiv
        2312.03732)."""
        alpha = self.network_alpha or float(self.rank)
        return alpha * math.sqrt(self.rank) if self.use_rslora else alpha

    @property
    def layers(self) -> tuple[str, ...]:
        """The ends of the names of its layers."""
        return target_layers(self.lora_targets)

    @property
    def own_names(self) -> tuple[str, ...]:
        """Those that a person named, which must all exist."""
        return tuple(name for name in _words(self.lora_targets) if name not in LORA_TARGETS)


def target_layers(text: str) -> tuple[str, ...]:
    """The ends of layers' names: of the sets in `LORA_TARGETS`, and names, with commas between them.

    >>> target_layers("attention,conv_in")
    ('to_q', 'to_k', 'to_v', 'to_out.0', 'conv_in')
    """
    return tuple(dict.fromkeys(name for word in _words(text) for name in LORA_TARGETS.get(word, (word,))))


def targets_fault(text: str) -> str | None:
    """What is wrong with such a text; whether the network has the layers is seen when it is known."""
    return None if all(_words(text)) else "an empty name beside a comma"


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def check_lora(options: GivenLora) -> None:
    """Raise UsageError for options about a LoRA that is not given."""
    for name in ("lora_partial", "lora_file_alpha"):
        if options.lora is None and getattr(options, name):
            raise UsageError(f"--{name} is about the file of --lora: give that too, or leave it out")
