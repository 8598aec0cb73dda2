"""What kind of file people hand in: a model of a supported family, or what else it is and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .contents import Contents, Entry, NotAModel
from .names import FIRST_CLIP, OPEN_CLIP, SDXL_CLIP, SDXL_OPEN_CLIP, UNET, VAE

SD1, SD2, SDXL = "SD 1.x", "SD 2.x", "SDXL"
FIRST = UNET + "input_blocks.0.0.weight"
READABLE = ("F64", "F32", "F16", "BF16")
LATENTS = 4
# By the UNet's input channels.
RELATIVES = {
    9: "an inpainting model",
    8: "a model that edits pictures (InstructPix2Pix)",
    5: "a depth model",
    7: "an upscaler",
}
BASE = "which is not supported: use the text-to-image model that it was made from"


@dataclass(frozen=True)
class Pattern:
    """A kind of file by a pattern that one of its keys contains; `word` is for `NotAModel.kind`."""

    word: str
    keys: str
    what: str


# In this order: a file is the first of them that it resembles.
OTHERS = (
    Pattern(
        "lora",
        r"lora_|\.lora\.|lokr_|hada_|\.diff(_b)?$|\.dora_scale$|oft_|\.lora_",
        "a LoRA or a relative of one, which changes a model but is none",
    ),
    Pattern("controlnet", r"^control_model\.|input_hint_block|controlnet_cond", f"a ControlNet, {BASE}"),
    Pattern("transformer", r"joint_blocks\.", "a model of Stable Diffusion 3, whose network is a transformer"),
    Pattern("transformer", r"double_blocks\.|single_blocks\.", "a model of the Flux family, a transformer"),
    Pattern("cascade", r"clip_txt_mapper|\.channelwise\.", "a model of Stable Cascade"),
    Pattern("transformer", r"\.?(transformer_blocks|blocks|layers)\.\d+\..*(adaLN|scale_shift|cross_attn)",
            "a model whose network is a transformer"),
    Pattern("component", r"^(down_blocks|mid_block|up_blocks)\.", "a UNet alone, in diffusers' names"),
    Pattern("component", r"^(input_blocks|middle_block|output_blocks)\.", "a UNet alone, without text encoder and VAE"),
    Pattern("vae", r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)", "a VAE alone"),
    Pattern("component", r"(^|\.)(text_model|resblocks)\.", "a text encoder alone"),
    Pattern("embedding", r"^(emb_params|string_to_param|clip_[lg])$|^<.*>$", "an embedding (textual inversion)"),
)  # fmt: skip
CURES = {
    "lora": "merge it into the model that it was made for",
    "transformer": "this program trains UNets: Stable Diffusion 1.x, 2.x and SDXL",
    "cascade": "this program trains UNets: Stable Diffusion 1.x, 2.x and SDXL",
    "controlnet": "",
    "component": "give the whole model: one file with all, or the folder in diffusers' format",
    "vae": "give the whole model, and this file as its VAE",
    "embedding": "give the model that it was made for",
}


def family_of(contents: Contents) -> str:
    """The family of a single-file model: SD1, SD2 or SDXL.

    Raises:
        NotAModel: it is something else, which the message names, with what to do.
    """
    path, entries = contents.path, contents.entries
    if not entries:
        raise NotAModel(f"{path} holds no tensors: fetch it again")
    if quantized := quantization_of(entries):
        raise NotAModel(
            f"{path} is quantized ({quantized}), and rounding weights once more would be trained upon: "
            "use the model's fp16, bf16 or fp32 file",
            "quantized",
        )
    if FIRST not in entries:
        raise _other(contents)
    channels = entries[FIRST].shape[1]
    if channels != LATENTS:
        kind = RELATIVES.get(channels, f"a model whose network takes {channels} channels")
        raise NotAModel(f"{path} is {kind}, {BASE}", "relative")
    return _by_text_encoder(contents)


def quantization_of(entries: Mapping[str, Entry]) -> str | None:
    """The kind of quantization, if weights have one."""
    for key, entry in entries.items():
        if entry.dtype.upper().startswith(("F8", "FLOAT8")) or key == "scaled_fp8":
            return "fp8"
        if "bitsandbytes" in key or key.endswith((".absmax", ".quant_map", ".SCB")):
            return "nf4 or int8"
        if entry.dtype not in READABLE and key.endswith(".weight") and len(entry.shape) >= 2:
            return entry.dtype
    return None


def _other(contents: Contents) -> NotAModel:
    for pattern in OTHERS:
        if any(re.search(pattern.keys, key) for key in contents.entries):
            cure = CURES[pattern.word]
            return NotAModel(f"{contents.path} is {pattern.what}{': ' + cure if cure else ''}", pattern.word)
    first = min(contents.entries)[:80]
    return NotAModel(
        f"{contents.path} is of an unknown kind (its first tensor is {first!r}): "
        "give a file of Stable Diffusion 1.x, 2.x or SDXL, or a folder in diffusers' format",
        "unknown",
    )


def _by_text_encoder(contents: Contents) -> str:
    starts = {prefix: any(key.startswith(prefix) for key in contents.entries) for prefix in (
        SDXL_OPEN_CLIP, SDXL_CLIP, "conditioner.embedders.0.model.", OPEN_CLIP, "cond_stage_model.transformer."
    )}  # fmt: skip
    sized = UNET + "label_emb.0.0.weight" in contents.entries
    if starts["conditioner.embedders.0.model."]:
        raise NotAModel(f"{contents.path} is an SDXL refiner, {BASE} (the base model's file)", "refiner")
    if starts[SDXL_OPEN_CLIP] and starts[SDXL_CLIP]:
        return SDXL
    if starts[OPEN_CLIP] and not sized:
        return SD2
    if starts["cond_stage_model.transformer."] and not sized:
        return SD1
    if sized and (starts[OPEN_CLIP] or starts["cond_stage_model.transformer."]):
        raise NotAModel(f"{contents.path} is a model that varies pictures (unCLIP), {BASE}", "relative")
    raise NotAModel(
        f"{contents.path} has no text encoder: use the model's full file, or its folder in diffusers' format",
        "incomplete",
    )


def has_vae(contents: Contents) -> bool:
    return any(key.startswith(VAE) for key in contents.entries)


def canonical(key: str) -> str:
    """The name of a tensor as `names` has it: older files leave out `text_model`."""
    start = FIRST_CLIP.removesuffix("text_model.")
    rest = key.removeprefix(start)
    return FIRST_CLIP + rest if rest.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else key
