"""Stage 1: the autoencoder, 64x64 pictures to 16x16x4 latents, trained on rendered pictures only."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from diffusion_align.rng import generator
from diffusion_align.shapes import judge, sample_captions

from .fit import fit
from .pictures import crowds, rendered

BATCH = 16
KL_WEIGHT = 1e-4  # per dimension: enough to keep the latents from growing, too little to blur


def new_vae(seed: int) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=64,
            mid_block_add_attention=False,
        )
    return vae.to(memory_format=torch.channels_last)


def train_vae(folder: Path, *, seed: int, steps: int, pictures: int) -> AutoencoderKL:
    vae = new_vae(seed)
    data = torch.cat([rendered(sample_captions(pictures, seed), seed), crowds(pictures, seed)])

    def loss_at(step: int) -> Tensor:
        rng = generator(seed, "vae", step)
        rows = torch.randint(len(data), (BATCH,), generator=rng)
        x = (data[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
        y = vae.decode(z).sample
        # Squared error learns the colours; absolute error sharpens edges, but alone it learns only the background.
        sharpness = min(1.0, step / 500)
        return F.mse_loss(y, x) + sharpness * F.l1_loss(y, x) + KL_WEIGHT * posterior.kl().mean() / z[0].numel()

    fit("vae", folder, {"vae": vae}, loss_at, steps=steps, learning_rate=3e-3)
    latents = encode(vae, data[: min(2048, pictures)])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    return vae


def polish_decoder(vae: AutoencoderKL, folder: Path, *, seed: int, steps: int, pictures: int) -> None:
    """Sharpen the decoder only, on captioned pictures; latents do not change."""
    data = rendered(sample_captions(pictures, seed + 10), seed + 10)

    def loss_at(step: int) -> Tensor:
        rng = generator(seed, "decoder", step)
        rows = torch.randint(len(data), (BATCH,), generator=rng)
        x = data[rows].float() / 127.5 - 1
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
        # Slightly wrong latents, as the denoiser makes them, must still decode to sharp corners.
        z = z + 0.03 / vae.config.scaling_factor * torch.randn(z.shape, generator=rng)
        return F.l1_loss(vae.decode(z).sample, x)

    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    fit("decoder", folder, parts, loss_at, steps=steps, learning_rate=2e-3)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, chunk: int = 64) -> Tensor:
    """`[N,3,64,64]` uint8 to `[N,4,16,16]`: posterior means, not scaled."""
    parts = [vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pictures.split(chunk)]
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_accuracy(vae: AutoencoderKL, seed: int, n: int) -> dict[str, float]:
    """The judge's accuracy on reconstructed held-out pictures, per attribute."""
    captions = sample_captions(n, seed, split="held-out")
    latents = encode(vae, rendered(captions, seed + 1))
    pictures = torch.cat([vae.decode(part).sample for part in latents.split(64)]) / 2 + 0.5
    return {name: marks.nanmean().item() for name, marks in judge(pictures, captions).items()}
