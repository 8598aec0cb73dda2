"""The header of a kohya LoRA file, which A1111, ComfyUI's managers and model sites show."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..lora.files import Lora

MODELSPEC = "1.0.0"
ORIGINAL_CODE = "https://github.com/Stability-AI/generative-models"
_LEGACY = slice(0x100000, 0x110000)  # the bytes of the file that A1111's first kind of hash reads


@dataclass(frozen=True)
class Published:
    """A published family of models, by the names that kohya's scripts and Stability's modelspec have for it."""

    kohya: str
    modelspec: str
    is_v2: bool


def published_family(unet: Mapping[str, Any], prediction_type: str) -> Published | None:
    """The published family that a network belongs to, by its configuration; None for a network of other widths."""
    v = prediction_type == "v_prediction"
    width, added = unet.get("cross_attention_dim"), unet.get("addition_embed_type")
    if width == 2048 and added == "text_time":
        return Published("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", False)
    if width == 768 and added is None:
        return Published("sd_v1_v" if v else "sd_v1", "stable-diffusion-v1", False)
    if width == 1024 and added is None:
        return Published(
            "sd_v2_v" if v else "sd_v2", "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512", True
        )
    return None


def lora_metadata(lora: Lora, family: Published | None, prediction_type: str, original: bool) -> dict[str, str]:
    """What the tensors and the base's configuration tell. `original`: the layers have the original names."""
    rank, alpha = str(lora.rank), plain_number(lora.alpha)
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha}
    if any(down.ndim == 4 and down.shape[2:] != (1, 1) for down, _ in lora.pairs.values()):
        metadata["ss_network_args"] = json.dumps({"conv_dim": rank, "conv_alpha": alpha})
    metadata["modelspec.sai_model_spec"] = MODELSPEC
    metadata["modelspec.implementation"] = ORIGINAL_CODE if original else "diffusers"
    metadata["modelspec.prediction_type"] = {"epsilon": "epsilon", "v_prediction": "v"}.get(
        prediction_type, prediction_type
    )
    if family is not None:
        metadata |= {"ss_base_model_version": family.kohya, "ss_v2": str(family.is_v2)}
        metadata["modelspec.architecture"] = f"{family.modelspec}/lora"
    return metadata


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the two hashes by which A1111 finds a LoRA. Only the fields of training, "ss_...", enter them,
    because A1111 lets its users change the others."""
    data = save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    return dict(metadata) | {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[_LEGACY]).hexdigest()[:8],
    }


def plain_number(value: float) -> str:
    """A number without a needless ".0"."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))
