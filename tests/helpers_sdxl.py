"""A random SDXL-format folder small enough to be built and run inside a test.

    folder = make_tiny_sdxl_folder(tmp_path / "model")     # about 0.3 M random weights, 32x32 pictures, 4x8x8 latents
    model = load_pipeline(folder)

Every part has the classes and file names of stable-diffusion-xl-base-1.0, so plain diffusers loads it too. No two
widths are equal where SDXL's are not: 24 + 40 make hidden states 64 wide, and the pooled embedding has 48.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from helpers_tiny import LATENT_SHAPE, RESOLUTION, TEXT_SHAPE, tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

TOKENS = TEXT_SHAPE[0]
WIDTHS = (24, 40)
POOLED = 48
PACKED_SHAPE = (TOKENS + 2, sum(WIDTHS))
TIME_WIDTH = 8


def make_tiny_sdxl_folder(
    path: str | Path, prediction_type: str = "epsilon", seed: int = 0, force_zeros: bool = True
) -> Path:
    """Write a random pipeline ("epsilon" or "v_prediction") to `path` and return it. Same seed, same weights."""
    first = tiny_tokenizer()  # its trainer breaks ties by chance: another one would number some words otherwise
    tokenizers = first, copy.deepcopy(first)
    tokenizers[1].pad_token = "!"  # SDXL's second tokenizer pads with token 0, its first with the end of text

    def text_config(i: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizers[i]),
            hidden_size=WIDTHS[i],
            intermediate_size=64,
            num_hidden_layers=2 + i,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act=("quick_gelu", "gelu")[i],
            projection_dim=POOLED,
            bos_token_id=tokenizers[i].bos_token_id,
            eos_token_id=tokenizers[i].eos_token_id,
            pad_token_id=tokenizers[i].pad_token_id,
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = CLIPTextModel(text_config(0)), CLIPTextModelWithProjection(text_config(1))
        unet = UNet2DConditionModel(
            sample_size=LATENT_SHAPE[1],
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=sum(WIDTHS),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_WIDTH,
            projection_class_embeddings_input_dim=6 * TIME_WIDTH + POOLED,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=RESOLUTION,
            scaling_factor=0.13025,
            force_upcast=True,
        )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(path)
    return Path(path)
