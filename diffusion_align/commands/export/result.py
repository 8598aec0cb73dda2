"""What is exported: the result of a run, a checkpoint of one, or a LoRA file; and the model it was trained from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.commands.evaluate.contenders import CHECKPOINTS, contender
from diffusion_align.commands.model.base import as_given, base_fields
from diffusion_align.commands.sources import present_model
from diffusion_align.commands.trained_weights import LORA_FILE, trained_weights
from diffusion_align.models.hub import on_hub
from diffusion_align.models.lora.opening import PEFT_FILE, holds_adapter
from diffusion_align.options import Export, UsageError
from diffusion_align.options.lora import NewLora

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffusion_align.models.lora.files import Adapter
    from diffusion_align.models.lora.tensors import Source


@dataclass(frozen=True)
class Result:
    """Trained weights. `base` has the `base_fields` of their model; `config` is the run's, {} for a LoRA
    file."""

    name: str
    place: Path
    base: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    alpha: float | None = None  # of a LoRA file that does not tell it

    @property
    def is_checkpoint(self) -> bool:
        return self.place.parent.name == CHECKPOINTS

    @property
    def is_lora(self) -> bool:
        if not self.config:
            return True
        if self.is_checkpoint:
            return (self.config.get("adapter") or {}).get("mode", "lora") == "lora"
        return trained_weights(self.place).name == LORA_FILE

    @property
    def base_label(self) -> str:
        """The base's hub id, or the last part of its path, which tells nothing about this machine."""
        name = self.base["pretrained_model_name_or_path"]
        return name if on_hub(name) and not Path(name).exists() else Path(name).name

    def adapter(self, networks: Mapping[str, nn.Module]) -> tuple[Adapter, Source]:
        """The layers of a LoRA, or of another adapter in a file, for these networks, and notes on what was repaired.

        Raises:
            FileNotFoundError, ValueError: as `open_adapter`. CheckpointError: the checkpoint is damaged.
        """
        from diffusion_align.models.lora.files import METADATA, read_adapter
        from diffusion_align.models.lora.opening import open_for
        from diffusion_align.models.lora.tensors import Source

        if not self.is_checkpoint:
            return open_for(networks, self.place, alpha=self.alpha)
        new = NewLora.of(self.config["adapter"])
        about = {"unet.r": new.rank, "unet.lora_alpha": new.alpha, "unet.target_modules": list(new.layers)}
        header = {METADATA: json.dumps(about | {"unet.use_dora": new.use_dora})}

        source = Source(self.place)
        return read_adapter(source, self._checkpoint(), header, networks), source

    def unet(self) -> dict[str, Tensor]:
        """The tensors of a UNet that was trained in full."""
        from diffusion_align.models.export.networks import read_unet

        return self._checkpoint() if self.is_checkpoint else read_unet(self.place / "unet")

    def _checkpoint(self) -> dict[str, Tensor]:
        """The trained weights of a checkpoint; their average, where the run keeps one and would export it."""
        from diffusion_align.train.checkpoints import store as checkpoint

        saved = checkpoint.load(self.place)
        return saved.tensors.get("ema") or saved.tensors["model"]

    @property
    def start(self) -> str | None:
        """What the run made of the LoRA that it started from: "continue", "beneath" or "merge"; None without one."""
        adapter = self.config.get("adapter") or {}
        return adapter["lora_mode"] if adapter.get("lora") is not None else None

    @property
    def run(self) -> Path:
        return self.place.parent.parent if self.is_checkpoint else self.place


def find_result(o: Export) -> Result:
    """The trained weights that the options name.

    Raises:
        UsageError: a LoRA file without its model, or a model that nobody trained here.
        FileNotFoundError: no such run, checkpoint or file; no trained weights; or a run whose model is gone.
    """
    assert o.run is not None  # the options' check requires it
    path = Path(o.run)
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    is_adapter = (path.is_file() and holds_adapter(path)) or (
        path.is_dir() and not (run / "config.yaml").is_file() and _holds_lora(path)
    )
    if is_adapter:
        if o.pretrained_model_name_or_path is None:
            raise UsageError(f"{path} is a LoRA without a run: --model says which model it belongs to")
        base = base_fields({"pretrained_model_name_or_path": present_model(o.pretrained_model_name_or_path)})
        return Result(path.stem, path, as_given(base, o), alpha=o.alpha)
    if (path / "model_index.json").is_file() or path.is_file():
        raise UsageError(f"{path} is a model that was not trained here: give the folder of a run, or a LoRA file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run, checkpoint or model")
    who = contender(o.run, o.pretrained_model_name_or_path)
    name = who.name.replace(" ", "-")  # a checkpoint's is "RUN step-..."
    return Result(name, path, as_given(who.base, o), who.config)


def _holds_lora(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (LORA_FILE, PEFT_FILE))
