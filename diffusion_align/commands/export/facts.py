"""What the header of an exported LoRA tells about its training, from the run's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.commands.export.result import Result
from diffusion_align.commands.model_facts import read_model_facts
from diffusion_align.picture_size import sides

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_align.models.lora.files import Lora

# The options that kohya's scripts record under "ss_" and the same name.
_RECORDED = ("seed", "lr_scheduler", "max_train_steps", "gradient_accumulation_steps", "mixed_precision")


def lora_header(
    result: Result, loras: Mapping[str, Lora], tensors: Mapping[str, Tensor], place: Path, *, original: bool
) -> dict[str, str]:
    """The header of a kohya file. `place` is the base's folder or file; `original`: layers have the original names."""
    from diffusion_align.models.export.metadata import lora_metadata, published_family, with_hashes

    facts = read_model_facts(str(place), result.base.get("prediction_type"))
    prediction = facts.scheduler.get("prediction_type", "epsilon")
    family = published_family(facts.unet, prediction)
    metadata = lora_metadata(loras["unet"], family, prediction, original) | training_facts(result)
    return with_hashes(tensors, metadata)


def title(result: Result, what: str) -> str:
    """A title without the run's name, place or time."""
    verb = result.config.get("verb")
    return f"{what} from {result.base_label}" + (f", by {verb}" if verb else "")


def training_facts(result: Result) -> dict[str, str]:
    """Facts for the header. Nothing in it depends on the run's name, place or time, so equal runs make equal files."""
    options = _options(result.config)
    verb = result.config.get("verb")
    facts = {"ss_sd_model_name": result.base_label, "modelspec.title": title(result, "LoRA")}
    facts |= {f"ss_{name}": str(options[name]) for name in _RECORDED if options.get(name) is not None}
    if options.get("learning_rate") is not None and not options.get("scale_lr"):
        facts["ss_learning_rate"] = str(options["learning_rate"])
    if (options.get("clip_skip") or 1) > 1:
        facts["ss_clip_skip"] = str(options["clip_skip"])
    size = options.get("resolution")
    if isinstance(size, int | str):
        width, height = sides(size)
        facts |= {"ss_resolution": f"({width}, {height})", "modelspec.resolution": f"{width}x{height}"}
    if verb:
        facts["ss_training_comment"] = _comment(verb, options, result)
    return facts


def _comment(verb: str, options: dict[str, Any], result: Result) -> str:
    """The training in a line."""
    words = [f"diffusion_align {verb}"]
    words += [
        f"{name} {options[name]}"
        for name in ("loss_type", "beta_dpo", "beta_convention")
        if options.get(name) is not None
    ]
    if result.is_checkpoint:
        words.append(f"checkpoint {result.place.name}")
    return ", ".join([*words, *(["moving average of the weights"] if options.get("use_ema") else [])])


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """The options of all sections by name."""
    return {name: value for section in config.values() if isinstance(section, dict) for name, value in section.items()}
