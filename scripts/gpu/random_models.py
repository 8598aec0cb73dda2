"""Makes model folders with the architectures of Stable Diffusion 1.5 and SDXL and random weights.

Speed and memory depend only on the architecture, so such a folder costs what the real one would, without a download.
The tokenizer is CLIP's own: open_clip ships its merges. The `small-` sizes have the same classes and a few thousand
times fewer weights.
"""

from __future__ import annotations

import copy
import gzip
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SD15_UNET: dict[str, Any] = dict(
    sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768,
    attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)  # fmt: skip
SDXL_UNET: dict[str, Any] = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
BIG_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
)
SMALL: dict[str, Any] = dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
SMALL_SD15 = SMALL | dict(
    cross_attention_dim=32, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
SMALL_SDXL = SMALL | dict(
    cross_attention_dim=80, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=96,
)  # fmt: skip
SMALL_VAE = VAE | dict(block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4)
SMALL_CLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=32)
SMALL_G = SMALL_CLIP | dict(hidden_size=48, projection_dim=48)

SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[dict[str, int], ...]]] = {
    "sd15": (SD15_UNET, VAE, (CLIP_L,)),
    "sdxl": (SDXL_UNET, VAE, (CLIP_L, BIG_G)),
    "small-sd15": (SMALL_SD15, SMALL_VAE, (SMALL_CLIP,)),
    "small-sdxl": (SMALL_SDXL, SMALL_VAE, (SMALL_CLIP, SMALL_G)),
}
"""{name: configurations of UNet, VAE and text encoders}; SDXL has two text encoders."""


def make_model(size: str, folder: Path, device: str = "cpu", seed: int = 0) -> Path:
    """Write a random pipeline of one of `SIZES` as float16 files; return its folder. `device` draws the weights."""
    unet_config, vae_config, clips = SIZES[size]
    sdxl = len(clips) > 1
    tokenizers = [clip_tokenizer()]
    if sdxl:
        tokenizers.append(copy.deepcopy(tokenizers[0]))
        tokenizers[1].pad_token = "!"  # SDXL's second tokenizer pads with token 0
    cuda = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(seed)
        # Convert one component at a time, so that the whole model is never in memory in both precisions.
        parts: dict[str, Any] = {"unet": UNet(**unet_config).half().cpu()}
        scale = 0.13025 if sdxl else 0.18215
        parts["vae"] = AutoencoderKL(**vae_config, sample_size=512, scaling_factor=scale).half().cpu()
        for i, clip in enumerate(clips):
            kind = CLIPTextModelWithProjection if i else CLIPTextModel
            parts["text_encoder_2" if i else "text_encoder"] = kind(_text_config(clip, tokenizers[i], i)).half().cpu()
    parts["scheduler"] = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    parts["tokenizer"] = tokenizers[0]
    if sdxl:
        StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizers[1], add_watermarker=False).save_pretrained(folder)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts, **none).save_pretrained(folder)
    return folder


def _text_config(sizes: dict[str, int], tokenizer: CLIPTokenizer, place: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=77, hidden_act=("quick_gelu", "gelu")[place],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer of 49,408 tokens, from the merges that open_clip ships: bytes, bytes that end a word, merges."""
    packed = files("open_clip").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]  # the first line is a title
    merges = [tuple(line.split()) for line in lines]
    alphabet = _byte_letters()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary: first the printable bytes as themselves,
    then the others as the letters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(printable))
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]
