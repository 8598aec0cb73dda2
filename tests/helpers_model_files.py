"""Tiny models with the true architectures, key names and vocabulary, as diffusers' folders and as single files.

    source = make_model(tmp_path / "m", "SDXL")     # a diffusers folder, random weights, 64x64 pictures

Widths and depths are small; heads of 64 (8 heads in Stable Diffusion 1.5's UNet), 32 groups, four levels of the VAE,
two or four of the UNet, CLIP's vocabulary and the last layer that Stable Diffusion 2 leaves out are as published.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion_align.models.single_file.tokenizer import clip_tokenizer
from diffusion_align.models.single_file.write import modelspec, save_single_file

SIDE = 64
KINDS = ("SD 1.x", "SD 2.x v", "SDXL", "SDXL v zero")
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def _text(width, layers, activation, projection=None):
    return CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), max_position_embeddings=77, hidden_act=activation,
        projection_dim=projection or width, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip


def _unet(kind, width):
    xl = kind.startswith("SDXL")
    levels = (32, 128) if xl else (32, 32, 64, 128)
    crossed = [True] * (len(levels) - 1)
    crossed = [False, *crossed] if xl else [*crossed, False]
    settings = {
        "sample_size": SIDE // 8,
        "block_out_channels": levels,
        "layers_per_block": 2 if kind == "SD 1.x" else 1,
        "down_block_types": tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossed),
        "up_block_types": tuple("CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crossed)),
        "cross_attention_dim": width,
        "attention_head_dim": 8 if kind == "SD 1.x" else tuple(max(1, level // 64) for level in levels),
        "use_linear_projection": kind != "SD 1.x",
    }
    if xl:
        settings |= {
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
        }
    return UNet2DConditionModel(**settings)


def make_model(path: Path, kind: str, seed: int = 0) -> Path:
    """Write a random model of one of KINDS in diffusers' format."""
    xl, second = kind.startswith("SDXL"), kind.startswith("SD 2")
    v, zero = " v" in kind, kind.endswith("zero")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction" if v else "epsilon", rescale_betas_zero_snr=zero,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = CLIPTextModel(_text(32, 2, "gelu" if second else "quick_gelu"))
        vae = AutoencoderKL(
            block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, sample_size=SIDE,
            scaling_factor=0.13025 if xl else 0.18215,
        )  # fmt: skip
        parts = {"unet": _unet(kind, 96 if xl else 32), "vae": vae, "text_encoder": first, "scheduler": scheduler}
        if xl:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(_text(64, 2, "gelu", 24))
    parts["tokenizer"] = clip_tokenizer(77, pad_with_zero=second)
    if xl:
        parts["tokenizer_2"] = clip_tokenizer(77, pad_with_zero=True)
        StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(path)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts, **none).save_pretrained(path)
    return path


def weights(folder: Path) -> dict[str, Path]:
    """The file of weights of each component."""
    return {name: next((folder / name).glob("*model*")) for name in COMPONENTS if (folder / name).is_dir()}


def states_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(file) for name, file in weights(folder).items()}


def halved(source: Path, to: Path, *, plain_too: bool, only: tuple[str, ...] = COMPONENTS) -> Path:
    """A copy with `*.fp16.safetensors`, beside the plain files or in their place."""
    shutil.copytree(source, to)
    for name, file in weights(to).items():
        if name not in only:
            continue
        half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in load_file(file).items()}
        save_file(half, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"})
        if not plain_too:
            file.unlink()
    return to


def pickled(source: Path, to: Path) -> Path:
    """A copy with `.bin` files in place of safetensors."""
    shutil.copytree(source, to)
    for name, file in weights(to).items():
        stem = "pytorch_model" if name.startswith("text") else "diffusion_pytorch_model"
        torch.save(load_file(file), file.with_name(f"{stem}.bin"))
        file.unlink()
    return to


def single(source: Path, to: Path, kind: str, dtype: torch.dtype, told: bool = True) -> Path:
    """One file of the original code. Without `told` it has marks and the resolution, as other trainers write it."""
    v, family = " v" in kind, kind.split(" v")[0]
    spec = modelspec(family, "v_prediction" if v else "epsilon", SIDE, "tiny")
    spec = spec if told else {"modelspec.resolution": spec["modelspec.resolution"]}
    marks = {"v_prediction": v and family == "SDXL", "zero_terminal_snr": kind.endswith("zero")}
    return save_single_file(to, states_of(source), dtype=dtype, metadata=spec, **marks)


def set_scheduler(folder: Path, **changes: object) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
