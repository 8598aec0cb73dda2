"""What `evaluate` compares: the result of a run, a checkpoint of one, or a model by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion_align.commands.adapters import add_trained, kept_lora, merge_given, saved_lora_options, start_from
from diffusion_align.commands.model.base import base_fields, load_base
from diffusion_align.commands.model.same_base import require_same_base
from diffusion_align.commands.sources import present_model
from diffusion_align.commands.trained_weights import (
    base_of,
    load_start,
    load_tuned,
    run_config,
    trained_at,
    trained_weights,
    weights_digest,
)
from diffusion_align.models.hub import on_hub
from diffusion_align.models.lora.opening import PEFT_FILE, adapter_digest, holds_adapter
from diffusion_align.options import Evaluate, UsageError
from diffusion_align.options.lora import NewLora

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Contender:
    """A model to draw with.

    `base` has the `base_fields` of the model that training started from. `trained` is the folder of a run or a
    checkpoint, None for the base itself; `config` is the run's, and `run` its folder. `adapter` is the file of a LoRA
    that is evaluated by itself.
    """

    name: str
    base: dict[str, Any]
    trained: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    run: Path | None = None
    adapter: Path | None = None

    @property
    def is_checkpoint(self) -> bool:
        return self.trained is not None and self.trained.parent.name == CHECKPOINTS

    def weights(self) -> str:
        """A digest of the trained weights; "base" without any."""
        if self.adapter is not None:
            return adapter_digest(self.adapter)
        if self.trained is None:
            return "base"
        return weights_digest(self.trained, "model.safetensors" if self.is_checkpoint else None)

    @property
    def resolution(self) -> int | str | None:
        """The resolution that it was trained at; None is the model's own."""
        return trained_at(self.config)

    def load(self, o: Evaluate) -> TextToImage:
        """The model with its weights in place, and before them what --lora names.

        Raises:
            FileNotFoundError, ValueError: as `load_pipeline` and `load_tuned`; CheckpointError for a damaged one.
        """
        model = load_base(self.base, o.device)
        if self.run is not None:
            named = o.pretrained_model_name_or_path is not None
            require_same_base(model, self.run, self.base["pretrained_model_name_or_path"], named=named)
        if o.lora is not None:
            merge_given(model, o.lora, o)
        if self.adapter is not None:
            merge_given(model, self.adapter, o)
        elif self.is_checkpoint:
            _load_checkpoint(model, self)
        elif self.trained is not None:
            load_tuned(model, self.trained)
        elif self.run is not None:
            load_start(model, self.run, self.config)
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
    if (path.is_file() and holds_adapter(path)) or (path / PEFT_FILE).is_file():
        if model is None:
            raise UsageError(f"{where} is a LoRA: --model says which model it belongs to")
        return Contender(path.stem, base_fields({"pretrained_model_name_or_path": present_model(model)}), adapter=path)
    if (path / "model_index.json").is_file() or path.is_file() or not path.exists():
        return Contender(path.name, base_fields({"pretrained_model_name_or_path": present_model(where)}))
    config = run_config(run)
    if run == path:
        trained_weights(path)
    name = run.resolve().name if run == path else f"{run.resolve().name} {path.name}"
    return Contender(name, base_of(run, config, model), path, config, run)


def base_contender(of: Contender) -> Contender:
    """The model that another one started from, with the LoRA that its training started from."""
    return Contender("base", of.base, config=of.config, run=of.run)


@torch.no_grad()
def _load_checkpoint(model: TextToImage, who: Contender) -> None:
    """The trained weights of a checkpoint; their average, where the run keeps one and would export it."""
    from diffusion_align.train.checkpoints import store as checkpoint

    assert who.trained is not None and who.run is not None
    saved = checkpoint.load(who.trained)
    adapter = who.config.get("adapter") or {}
    if (kept := kept_lora(who.run, who.config)) is not None:
        start_from(model, saved_lora_options(who.config), kept, adapter["lora_mode"])
    if adapter.get("mode", "lora") == "lora" and (kept is None or adapter["lora_mode"] != "continue"):
        add_trained(model, NewLora.of(adapter))
    weights = saved.tensors.get("ema") or saved.tensors["model"]
    named = dict(model.unet.named_parameters())
    wrong = [key for key, value in weights.items() if key not in named or named[key].shape != value.shape]
    if wrong:
        raise ValueError(f"{who.trained}: {wrong[0]!r} does not fit the model that its run's config.yaml names")
    for key, value in weights.items():
        named[key].copy_(value)
