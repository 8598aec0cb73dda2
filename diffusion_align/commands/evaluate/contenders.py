"""What `evaluate` compares: the result of a run, a checkpoint of one, or a model by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion_align.commands.model.base import base_fields, load_base
from diffusion_align.commands.sources import present_model
from diffusion_align.commands.trained_weights import (
    base_of,
    load_tuned,
    run_config,
    trained_at,
    trained_weights,
    weights_digest,
)
from diffusion_align.models.hub import on_hub
from diffusion_align.vocabulary import LORA_TARGETS

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Contender:
    """A model to draw with.

    `base` has the `base_fields` of the model that training started from. `trained` is the folder of a run
    or a checkpoint, None for the base itself; `config` is the run's.
    """

    name: str
    base: dict[str, Any]
    trained: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def is_checkpoint(self) -> bool:
        return self.trained is not None and self.trained.parent.name == CHECKPOINTS

    def weights(self) -> str:
        """A digest of the trained weights; "base" without any."""
        if self.trained is None:
            return "base"
        return weights_digest(self.trained, "model.safetensors" if self.is_checkpoint else None)

    @property
    def resolution(self) -> int | None:
        """The resolution that it was trained at; None is the model's own."""
        return trained_at(self.config)

    def load(self, device: str | None) -> TextToImage:
        """The model with its weights in place.

        Raises:
            FileNotFoundError, ValueError: as `load_pipeline` and `load_tuned`; CheckpointError for a damaged one.
        """
        model = load_base(self.base, device)
        if self.is_checkpoint:
            _load_checkpoint(model, self)
        elif self.trained is not None:
            load_tuned(model, self.trained)
        return model


def contender(where: str, model: str | None = None) -> Contender:
    """What a command line names: a run folder, RUN/checkpoints/step-..., or a model's folder or hub id.

    `model` replaces the model that a run's configuration names.

    Raises:
        FileNotFoundError: no such run, checkpoint or model, a run without trained weights, or one whose model is gone.
    """
    path = Path(where).expanduser()
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    if not path.exists() and (run != path or not (where == "tiny" or on_hub(where))):
        raise FileNotFoundError(f"{where}: no such run, checkpoint or model")
    if (path / "model_index.json").is_file() or path.is_file() or not path.exists():
        return Contender(path.name, base_fields({"pretrained_model_name_or_path": present_model(where)}))
    config = run_config(run)
    if run == path:
        trained_weights(path)
    name = run.resolve().name if run == path else f"{run.resolve().name} {path.name}"
    return Contender(name, base_of(run, config, model), path, config)


def base_contender(of: Contender) -> Contender:
    """The model that another one started from."""
    return Contender("base", of.base)


@torch.no_grad()
def _load_checkpoint(model: TextToImage, who: Contender) -> None:
    """The trained weights of a checkpoint; their average, where the run keeps one and would export it."""
    from diffusion_align.models import add_lora
    from diffusion_align.train.checkpoints import store as checkpoint

    assert who.trained is not None
    saved = checkpoint.load(who.trained)
    adapter = who.config.get("adapter") or {}
    if adapter.get("mode", "lora") == "lora":
        add_lora(model.unet, adapter["rank"], adapter.get("network_alpha"), LORA_TARGETS[adapter["lora_targets"]])
    weights = saved.tensors.get("ema") or saved.tensors["model"]
    named = dict(model.unet.named_parameters())
    wrong = [key for key, value in weights.items() if key not in named or named[key].shape != value.shape]
    if wrong:
        raise ValueError(f"{who.trained}: {wrong[0]!r} does not fit the model that its run's config.yaml names")
    for key, value in weights.items():
        named[key].copy_(value)
