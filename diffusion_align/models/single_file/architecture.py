"""The configurations of a single-file model, from the shapes of its tensors, its marks and its metadata.

Published sizes are nowhere assumed, so a model of another width or depth is read as well. What shapes do not tell is
the same in every model of a family: heads of 64 (8 heads in a Stable Diffusion 1.x UNet), 32 groups, the noise levels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .contents import Contents, Entry, NotAModel
from .kinds import SD1, SD2, SDXL, canonical, family_of, has_vae
from .names import FIRST_CLIP, OPEN_CLIP, SDXL_CLIP, SDXL_OPEN_CLIP, UNET, VAE

HEAD = 64
SCALING = {SD1: 0.18215, SD2: 0.18215, SDXL: 0.13025}
SIZES = 6  # numbers of size that SDXL's UNet takes
TOKENS = 49408  # of CLIP's vocabulary
V_MARK, ZERO_MARK, EDM_MARK = "v_pred", "ztsnr", "edm_"
TOLD = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "vpred": "v_prediction"}


class PredictionUnknown(NotAModel):
    """Nothing in the file says what its network predicts."""

    def __init__(self, message: str):
        super().__init__(message, "prediction")


@dataclass(frozen=True)
class Architecture:
    """Arguments of each network's class; `prediction_type` is None if the file does not tell it, `vae` if it has none.

    `parts` are the entries by component, under their names in the file.
    """

    family: str
    unet: dict[str, Any]
    vae: dict[str, Any] | None
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any] | None
    prediction_type: str | None
    zero_terminal_snr: bool
    resolution: int

    def scheduler(self, prediction_type: str | None = None) -> dict[str, Any]:
        """A scheduler_config.json; `prediction_type` replaces the file's.

        Raises:
            PredictionUnknown: it is not given and the file does not tell it.
        """
        kind = prediction_type or self.prediction_type
        if kind is None:
            raise PredictionUnknown(
                f"a single file of {SD2} does not tell what its network predicts: v_prediction is usual for 768 "
                "pixels, epsilon for 512 (base)"
            )
        config = {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": kind,
        }
        if self.zero_terminal_snr:
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config


def architecture_of(contents: Contents) -> Architecture:
    """What a single-file model is. Raises NotAModel for other files, and for relatives with another structure."""
    family = family_of(contents)
    entries = {canonical(key): entry for key, entry in contents.entries.items()}
    if any(key.startswith(EDM_MARK) for key in entries):
        raise NotAModel(
            f"{contents.path} is a model with EDM noise levels (edm_ in its keys), which are not supported: "
            "use a model with Stable Diffusion's noise levels",
            "relative",
        )
    prediction_type, size = _prediction_type(contents, family), _resolution(contents)
    resolution = size or {SD1: 512, SDXL: 1024}.get(family) or (512 if prediction_type == "epsilon" else 768)
    try:
        second = _open_clip(entries, SDXL_OPEN_CLIP) if family == SDXL else None
        vae = _vae(entries, VAE, SCALING[family], resolution) if has_vae(contents) else None
        factor = 2 ** (len(vae["block_out_channels"]) - 1) if vae else 8
        return Architecture(
            family=family,
            unet=_unet(entries, family, second, resolution // factor),
            vae=vae,
            text_encoder=_text_encoder(entries, family),
            text_encoder_2=second,
            prediction_type=prediction_type,
            zero_terminal_snr=ZERO_MARK in entries,
            resolution=resolution,
        )
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, NotAModel):
            raise
        raise NotAModel(
            f"{contents.path} is incomplete, or a relative of {family} with other layers: {error}"
        ) from error


def _prediction_type(contents: Contents, family: str) -> str | None:
    """By the mark of other trainers, by the ModelSpec, or by the family; None if nothing tells it."""
    if V_MARK in contents.entries:
        return "v_prediction"
    told = contents.metadata.get("modelspec.prediction_type", "").lower()
    if told in TOLD:
        return TOLD[told]
    named = contents.metadata.get("modelspec.architecture", "")
    if named.startswith("stable-diffusion-v2"):
        return "v_prediction" if "768-v" in named else "epsilon"
    return None if family == SD2 else "epsilon"


def _resolution(contents: Contents) -> int | None:
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", contents.metadata.get("modelspec.resolution", ""))
    side = min(int(match[1]), int(match[2] or match[1])) if match else 0
    return side - side % 64 or None


def _unet(entries: Mapping[str, Entry], family: str, second: Mapping[str, Any] | None, size: int) -> dict[str, Any]:
    """Walk the input blocks: each level has residual blocks, some with transformers, and ends with a reduction."""
    widths, depths, counts, count = [], [], [], 0
    width, depth = entries[UNET + "input_blocks.0.0.weight"].shape[0], 0
    for i in range(1, _number(entries, UNET + r"input_blocks\.(\d+)\.")):
        block = f"{UNET}input_blocks.{i}."
        if block + "0.op.weight" in entries:
            widths, depths, counts, count = [*widths, width], [*depths, depth], [*counts, count], 0
            continue
        width, count = entries[block + "0.out_layers.3.weight"].shape[0], count + 1
        depth = _number(entries, re.escape(block) + r"1\.transformer_blocks\.(\d+)\.")
    widths, depths, counts = [*widths, width], [*depths, depth], [*counts, count]
    crossed, linear = [depth > 0 for depth in depths], len(entries[_first(entries, r"\.proj_in\.weight")].shape) == 2
    middle = _number(entries, re.escape(UNET) + r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    if depths[-1] == 0:
        depths[-1] = middle
    config = {
        "sample_size": size,
        "in_channels": entries[UNET + "input_blocks.0.0.weight"].shape[1],
        "out_channels": entries[UNET + "out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": max(counts),
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in crossed],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(crossed)],
        "transformer_layers_per_block": [depth or 1 for depth in depths],
        "cross_attention_dim": entries[_first(entries, r"attn2\.to_k\.weight")].shape[1],
        "attention_head_dim": [max(1, width // HEAD) for width in widths] if linear else 8,
        "use_linear_projection": linear,
        "upcast_attention": family == SD2,  # its attention overflows in half precision
    }
    if second is None:
        return config
    sized, pooled = entries[UNET + "label_emb.0.0.weight"].shape[1], second["projection_dim"]
    return config | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (sized - pooled) // SIZES,
        "projection_class_embeddings_input_dim": sized,
    }


def vae_config(entries: Mapping[str, Entry], prefix: str, family: str, resolution: int) -> dict[str, Any]:
    """The configuration of the VAE in a file. Raises KeyError for a tensor that it should have."""
    return _vae(entries, prefix, SCALING[family], resolution)


def _vae(entries: Mapping[str, Entry], prefix: str, scaling: float, resolution: int) -> dict[str, Any]:
    levels = _number(entries, re.escape(prefix) + r"encoder\.down\.(\d+)\.")
    down = prefix + "encoder.down."
    return {
        "in_channels": entries[prefix + "encoder.conv_in.weight"].shape[1],
        "out_channels": entries[prefix + "decoder.conv_out.weight"].shape[0],
        "latent_channels": entries[prefix + "decoder.conv_in.weight"].shape[1],
        "block_out_channels": [entries[f"{down}{i}.block.0.conv1.weight"].shape[0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _number(entries, re.escape(down) + r"0\.block\.(\d+)\."),
        "sample_size": resolution,
        "scaling_factor": scaling,
        "force_upcast": True,
    }


def _text_encoder(entries: Mapping[str, Entry], family: str) -> dict[str, Any]:
    if family == SD2:
        config = _open_clip(entries, OPEN_CLIP)
        # The whole tower is in the file, but its last layer is never used; without the tower's end it was left out.
        whole = OPEN_CLIP + "text_projection" in entries or config["num_hidden_layers"] == 24
        return config | {"num_hidden_layers": config["num_hidden_layers"] - whole}
    prefix = SDXL_CLIP if family == SDXL else FIRST_CLIP
    width = entries[prefix + "final_layer_norm.weight"].shape[0]
    table = entries[prefix + "embeddings.token_embedding.weight"]
    positions = entries[prefix + "embeddings.position_embedding.weight"]
    inner = entries[prefix + "encoder.layers.0.mlp.fc1.weight"]
    layers = _number(entries, re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
    return _clip(width, inner.shape[0], layers, table, positions, "quick_gelu")


def _open_clip(entries: Mapping[str, Entry], prefix: str) -> dict[str, Any]:
    width = entries[prefix + "ln_final.weight"].shape[0]
    table, positions = entries[prefix + "token_embedding.weight"], entries[prefix + "positional_embedding"]
    inner = entries[prefix + "transformer.resblocks.0.mlp.c_fc.weight"]
    layers = _number(entries, re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    config = _clip(width, inner.shape[0], layers, table, positions, "gelu")
    projection = entries.get(prefix + "text_projection")
    return config | ({"projection_dim": projection.shape[1]} if projection else {})


def _clip(width: int, inner: int, layers: int, table: Entry, positions: Entry, activation: str) -> dict[str, Any]:
    if table.shape[0] != TOKENS:
        raise ValueError(f"its text encoder knows {table.shape[0]} tokens, where CLIP's vocabulary has {TOKENS}")
    return {
        "vocab_size": table.shape[0],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": positions.shape[0],
        "hidden_act": activation,
        "projection_dim": width,
        "bos_token_id": TOKENS - 2,
        "eos_token_id": TOKENS - 1,
    }


def _number(entries: Mapping[str, Entry], pattern: str) -> int:
    """One more than the largest number that the pattern finds in the keys; 0 without any."""
    found = [int(match[1]) for key in entries if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def _first(entries: Mapping[str, Entry], pattern: str) -> str:
    return next(key for key in sorted(entries) if key.startswith(UNET) and re.search(pattern, key))
