"""What a file's header, or peft's adapter_config.json, says about its tensors: rank, alpha and layers.

Every field that changes the output is honoured, or refused by name; so is a field that this version does not know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

METADATA = "lora_adapter_metadata"  # the header key under which diffusers keeps rank and alpha
_TYPES: dict[str, tuple[type[PeftConfig], str]] = {  # of peft: its fields, and the kind of its layers
    "LORA": (LoraConfig, "LoRA"),
    "LOHA": (LoHaConfig, "LoHa"),
    "LOKR": (LoKrConfig, "LoKr"),
}
_HONOURED = {
    "peft_type", "r", "lora_alpha", "alpha", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
}  # fmt: skip
# Where the weights came from, how they were trained, or what tensors show by themselves.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version",
    "lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "init_lora_weights",
    "eva_config", "megatron_core", "qalora_group_size", "runtime_config", "use_effective_conv2d", "decompose_both",
    "decompose_factor", "ensure_weight_tying", "lora_ga_config", "corda_config",
}  # fmt: skip
# Ways to start that leave the base's weights as they are. All others subtract the start from them.
_KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
_CONVERT = "save it with path_initial_model_for_weight_conversion, which makes peft convert it to a plain LoRA"


@dataclass(frozen=True)
class Settings:
    """The settings of one network's adapter. `pattern` are peft's rules for the layers that it has."""

    kind: str
    rank_default: int
    alpha_default: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilised: bool
    dora: bool
    pattern: Any

    def rank(self, layer: str) -> int:
        return int(self.ranks.get(get_pattern_key(list(self.ranks), layer), self.rank_default))

    def alpha(self, layer: str) -> float:
        """The alpha whose alpha / rank is the strength; rsLoRA's strength is alpha / sqrt(rank)."""
        alpha = float(self.alphas.get(get_pattern_key(list(self.alphas), layer), self.alpha_default))
        return alpha * math.sqrt(self.rank(layer)) if self.rank_stabilised else alpha

    def names_layer(self, layer: str, module: nn.Module) -> bool:
        """Whether the adapter has this layer."""
        targets = self.pattern.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return isinstance(module, nn.Linear)
        return bool(check_target_module_exists(self.pattern, layer))


def read_settings(path: Path, header: Mapping[str, str], network: str) -> Settings | None:
    """The settings of `network` in a header that diffusers, peft or this package wrote; None if it has none.

    Raises:
        ValueError: they cannot be read, or change the output in a way that is not supported; the message names the
            field.
    """
    if METADATA not in header:
        return None
    try:
        everything, prefix = json.loads(header[METADATA]), f"{network}."
        known = {key.removeprefix(prefix): value for key, value in everything.items() if key.startswith(prefix)}
        if network != "unet" and not known:
            return None
        kind = _type_of(known.get("peft_type"))
        alpha_name = "alpha" if kind in ("LOHA", "LOKR") else "lora_alpha"
        rank, alpha, targets = int(known["r"]), float(known[alpha_name]), known["target_modules"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: its header {METADATA} does not give rank, alpha and targets ({error!r})") from error
    words = f"{path}: its header gives {network}."
    if not math.isfinite(alpha) or alpha == 0:
        raise ValueError(f"{words}{alpha_name} as {alpha}, where a number other than 0 is needed")
    if not isinstance(targets, str) and not _texts(targets):
        raise ValueError(f"{words}target_modules as {targets!r:.90}, where a list of names is needed")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(known.get(name) or {}, dict) or not all(map(_number, (known.get(name) or {}).values())):
            raise ValueError(f"{words}{name} as {known[name]!r:.90}, where a table of numbers other than 0 is needed")
    _require_supported(f"{path}: its header sets {network}.", known, *_TYPES[kind])
    pattern = SimpleNamespace(
        target_modules=targets,
        exclude_modules=known.get("exclude_modules"),
        layers_to_transform=known.get("layers_to_transform"),
        layers_pattern=known.get("layers_pattern"),
        modules_to_save=None,
    )
    return Settings(
        _TYPES[kind][1], rank, alpha, known.get("rank_pattern") or {}, known.get("alpha_pattern") or {},
        bool(known.get("use_rslora")), bool(known.get("use_dora")), pattern,
    )  # fmt: skip


def require_known_type(path: Path, header: Mapping[str, str]) -> None:
    """Raise ValueError for a header of another kind of adapter of peft than those that can be taken."""
    try:
        everything = json.loads(header.get(METADATA, "{}"))
        types = {key: value for key, value in everything.items() if key.endswith(".peft_type")}
    except (ValueError, AttributeError, RecursionError):
        return  # `read_settings` says so
    if wrong := sorted(key for key, value in types.items() if _type_of(value) not in _TYPES):
        raise ValueError(
            f"{path}: its header sets {wrong[0]} {_type_of(types[wrong[0]])[:40]!r}, which cannot be taken: merge it "
            "with peft (merge_and_unload), and give the merged model"
        )


def _type_of(value: object) -> str:
    return str(value or "LORA").upper().rpartition(".")[2]


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value != 0


def _require_supported(words: str, known: Mapping[str, Any], config: type[PeftConfig], kind: str) -> None:
    """Raise ValueError for fields that change the output and are not honoured. Null, false and defaults pass."""
    start = known.get("init_lora_weights", True)
    if not any(start is value or (isinstance(value, str) and start == value) for value in _KEEP_BASE):
        raise ValueError(f"{words}init_lora_weights {start!r:.40}, which changed the base's weights too: {_CONVERT}")
    defaults = {field.name: getattr(config(), field.name) for field in fields(config)}
    for name, value in known.items():
        if name in _HONOURED | _WITHOUT_EFFECT or not value or value == defaults.get(name):
            continue
        raise ValueError(
            f"{words}{name} to {value!r:.60}, which is not supported: train without it, or merge it with peft "
            f"(merge_and_unload), and give the merged model"
        )
