"""Stage 2: the denoiser and its text encoder, trained together on captions and latents of rendered pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_align.rng import generator

from .fit import fit

BATCH = 32
WIDTH = 64
MAX_WEIGHT = 30.0  # of the second phase, relative to the plain error; 1 / alpha^2 would reach 213
EMPTY_SHARE = 0.1  # captions replaced by "" so that classifier-free guidance works
# Stable Diffusion 1.5's noise schedule.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def new_unet(seed: int) -> UNet2DConditionModel:
    """Attention at 8x8 and 4x4 only; at 16x16 it would make the network four times slower on a CPU."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 96),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    return unet


def new_text_encoder(seed: int, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.model_max_length,
                projection_dim=WIDTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_unet(
    folder: Path,
    tokenizer: CLIPTokenizer,
    captions: list[str],
    latents: Tensor,
    *,
    seed: int,
    steps: tuple[int, int, int],
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """`latents [N,4,16,16]` are scaled to unit variance; row i shows captions[i]. `steps` of the three phases.

    Phase 1 is the plain squared error of the noise. Flat pictures betray their background's colour through the mean of
    256 noisy latents even at the noisiest step, where that error weighs next to nothing, so the network learns to read
    the colour off the noise rather than off the caption. Phases 2 and 3 weigh errors there as a velocity's
    would be; the learning rate starts again with each.
    """
    unet, text_encoder = new_unet(seed), new_text_encoder(seed + 1, tokenizer)
    tokens, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    scheduler = DDPMScheduler(**SCHEDULE)

    velocity = (1 / scheduler.alphas_cumprod).clamp(max=MAX_WEIGHT)
    weights = {"unet": torch.ones_like(velocity), "unet-weighted": velocity, "unet-again": velocity}

    def loss_at(phase: str, step: int) -> Tensor:
        rng = generator(seed, phase, step)
        rows = torch.randint(len(latents), (BATCH,), generator=rng)
        noise = torch.randn((BATCH, *latents.shape[1:]), generator=rng)
        t = torch.randint(SCHEDULE["num_train_timesteps"], (BATCH,), generator=rng)
        dropped = torch.rand(BATCH, 1, generator=rng) < EMPTY_SHARE
        text = text_encoder(torch.where(dropped, empty, tokens[rows])).last_hidden_state
        noisy = scheduler.add_noise(latents[rows], noise, t)
        errors = F.mse_loss(unet(noisy, t, text).sample, noise, reduction="none").mean((1, 2, 3))
        return (weights[phase][t] * errors).mean()

    networks = {"unet": unet, "text_encoder": text_encoder}
    for phase, n in zip(weights, steps, strict=True):
        fit(phase, folder, networks, partial(loss_at, phase), steps=n, learning_rate=1e-3)
    return unet, text_encoder
