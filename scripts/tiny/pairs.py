"""The base model's own pictures, the judge's marks for them, and their bytes for tables of pairs and rankings."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffusion_align.data import Ranking, write_rankings_parquet
from diffusion_align.models import load_pipeline
from diffusion_align.objectives import win_counts
from diffusion_align.rng import normal_batch
from diffusion_align.samplers import sample, step_table
from diffusion_align.shapes import ATTRIBUTES, judge

STEPS, GUIDANCE = 10, 1.0  # without guidance, so that pictures show what the model learnt of the prompt
SHARD = 64  # prompts sampled between two saves


def own_pictures(folder: Path, name: str, base: Path, prompts: list[str], k: int, *, seed: int) -> Tensor:
    """`[P,K,3,64,64]` uint8: K samples of each prompt from the model; resumable by shards."""
    model = load_pipeline(str(base), device="cpu")
    table = step_table(model.schedule, STEPS, solver="dpmpp", order=2, eta=0.0)
    shards = []
    for start in tqdm(range(0, len(prompts), SHARD), desc=name):
        shard_file = folder / f"{name}-{start}.safetensors"
        if not shard_file.exists():
            some = [prompt for prompt in prompts[start : start + SHARD] for _ in range(k)]
            addresses = [(start + i // k, i % k) for i in range(len(some))]
            pictures = []
            for i in range(0, len(some), 64):
                x = normal_batch(model.latent_shape(), seed, name, addresses[i : i + 64])
                denoiser = model.denoiser(model.encode_text(some[i : i + 64]), guidance=GUIDANCE)
                with torch.no_grad():
                    pictures.append(model.decode(sample(denoiser, table, x)))
            levels = (torch.cat(pictures) * 255).round().to(torch.uint8)
            save_file({"pictures": levels.unflatten(0, (-1, k))}, shard_file.with_suffix(".tmp"))
            shard_file.with_suffix(".tmp").replace(shard_file)
        shards.append(load_file(shard_file)["pictures"])
    return torch.cat(shards)


def marks_of(pictures: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """The judge's marks `[P,K]` per attribute, and "share": the fraction of attributes that are right."""
    p, k = pictures.shape[:2]
    verdict = judge(pictures.flatten(0, 1).float() / 255, [prompt for prompt in prompts for _ in range(k)])
    single = torch.stack([verdict[name] for name in ATTRIBUTES if name != "all"])
    return {name: v.view(p, k) for name, v in {**verdict, "share": single.nanmean(0)}.items()}


def picture_bytes(picture: Tensor) -> bytes:
    """A `[3,64,64]` uint8 picture as a small WebP file; its compression is far below what the judge notices."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "WEBP", quality=92, method=6)
    return buffer.getvalue()


def write_rankings(out: Path, prompts: list[str], pictures: Tensor, scores: Tensor) -> None:
    """All K pictures `[P,K,3,64,64]` of each prompt, ranked by one scorer `[P,K]`; relevance is the rate of wins."""
    relevance = win_counts(scores[None].double())
    rows = zip(prompts, pictures, relevance.tolist(), scores.tolist(), strict=True)
    write_rankings_parquet(
        out,
        (
            Ranking(str(number), prompt, tuple(map(picture_bytes, own)), tuple(phi), (tuple(marks),))
            for number, (prompt, own, phi, marks) in enumerate(rows)
        ),
        rows_per_group=256,
    )
