"""Rebuild the embedded world from scratch: autoencoder, denoiser, reward, preferences; an hour on two CPU cores.

    python scripts/build_tiny.py                    # writes assets/tiny, tiny_clip, tiny_pairs and tiny_rankings
    python scripts/build_tiny.py --out /tmp/assets  # elsewhere

If it is interrupted, the same command continues: each stage keeps its state under --work. assets/tiny/build.json says
what was made and how good it is.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny.pairs import marks_of, own_pictures, picture_bytes, write_rankings
from tiny.pictures import rendered
from tiny.reward import save_clip, train_clip
from tiny.tokenizer import build_tokenizer
from tiny.unet import SCHEDULE, train_unet
from tiny.vae import encode, polish_decoder, reconstruction_accuracy, train_vae

from diffusion_align.data.pairs_and_rankings import write_pairs_parquet
from diffusion_align.rewards.clip import clip_scorer
from diffusion_align.rng import integers_batch
from diffusion_align.shapes import ATTRIBUTES, sample_captions

ROOT = Path(__file__).resolve().parent.parent


def build_vae(work: Path, size: argparse.Namespace) -> AutoencoderKL:
    folder = work / "vae"
    if not (folder / "config.json").exists():
        vae = train_vae(work, seed=size.seed, steps=size.vae_steps, pictures=size.pictures // 4)
        polish_decoder(vae, work, seed=size.seed, steps=size.decoder_steps, pictures=size.pictures // 4)
        accuracy = reconstruction_accuracy(vae, size.seed, size.reconstructions)
        print("judge on reconstructions:", json.dumps(accuracy))
        note(work, vae_steps=size.vae_steps, decoder_steps=size.decoder_steps, reconstruction=accuracy)
        vae.save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder)


def build_pipeline(work: Path, out: Path, vae: AutoencoderKL, size: argparse.Namespace) -> None:
    if (out / "model_index.json").exists():
        return
    captions = sample_captions(size.pictures, size.seed + 1)
    latents_file = work / "latents.safetensors"
    if not latents_file.exists():
        save_file({"latents": encode(vae, rendered(captions, size.seed + 1))}, latents_file)
    latents = load_file(latents_file)["latents"] * vae.config.scaling_factor
    tokenizer = build_tokenizer()
    unet, text_encoder = train_unet(work, tokenizer, captions, latents, seed=size.seed, steps=tuple(size.unet_steps))
    note(work, unet_steps=size.unet_steps)
    # The scheduler for plain diffusers: this project's evaluation sampler.
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="trailing")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    unet.half()  # half the space for 2.7 million weights; the loaders convert them back
    pipeline.save_pretrained(out)
    # diffusers adds the local folder that the VAE was loaded from.
    config = out / "vae" / "config.json"
    known = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(known, indent=2) + "\n")


def build_reward(work: Path, model: Path, out: Path, size: argparse.Namespace) -> None:
    if (out / "open_clip_config.json").exists():
        return
    tokenizer = build_tokenizer()
    prompts = sample_captions(size.reward_prompts, size.seed + 2)
    own = own_pictures(work, "reward-pictures", model, prompts, 4, seed=size.seed)
    marks = marks_of(own, prompts)["share"]
    captions = sample_captions(size.pictures // 4, size.seed + 3)
    pictures = rendered(captions, size.seed + 3)
    clip, config = train_clip(
        work, tokenizer, captions, pictures, prompts, own, marks, seed=size.seed, steps=size.reward_steps
    )
    note(work, reward_steps=size.reward_steps, reward_prompts=size.reward_prompts)
    save_clip(clip, config, tokenizer, out)


def build_pairs(work: Path, model: Path, reward: Path, out: Path, size: argparse.Namespace) -> None:
    """Rankings of four pictures, and pairs of the best and the worst of each."""
    rankings = out.with_name("tiny_rankings.parquet")
    if out.exists() and rankings.exists():
        return
    # New prompts of the training split, whose pictures the reward has not seen.
    prompts = sample_captions(size.pair_prompts, size.seed + 4, unique=True)
    own = own_pictures(work, "pair-pictures", model, prompts, 4, seed=size.seed + 1)
    scorer = clip_scorer(str(reward), device="cpu")
    repeated = [prompt for prompt in prompts for _ in range(4)]
    scores = scorer(own.flatten(0, 1).float() / 255, repeated).view(-1, 4)
    write_rankings(rankings, prompts, own, scores)
    if out.exists():  # made by a version without rankings
        return
    marks = marks_of(own, prompts)
    best, worst, rows = scores.argmax(1), scores.argmin(1), torch.arange(len(prompts))
    margin = marks["share"][rows, best] - marks["share"][rows, worst]
    note(
        work,
        pair_prompts=len(prompts),
        base_accuracy_on_training_prompts=marks["all"].mean().item(),
        reward_agrees_with_judge=((margin > 0).sum() / (margin != 0).sum()).item(),
        judge_accuracy_of_winners=marks["all"][rows, best].mean().item(),
        judge_accuracy_of_losers=marks["all"][rows, worst].mean().item(),
    )
    # The winner's side is drawn, so that a reader which ignores the label fails.
    winner_first = integers_batch(0, 2, size.seed, "side", range(len(prompts))).bool()
    sides = [torch.where(winner_first, a, b) for a, b in ((best, worst), (worst, best))]
    pictures = [[picture_bytes(picture) for picture in own[rows, side]] for side in sides]
    extra = {f"score_{i}": scores[rows, side].tolist() for i, side in enumerate(sides)}
    write_pairs_parquet(out, prompts, *pictures, winner_first.float().tolist(), extra)


def measure(work: Path, model: Path, size: argparse.Namespace) -> None:
    """The base model's accuracy on held-out prompts, which alignment can improve."""
    prompts = sample_captions(size.measure_prompts, size.seed + 5, split="held-out")
    own = own_pictures(work, "held-out-pictures", model, prompts, 1, seed=size.seed + 2)
    marks = marks_of(own, prompts)
    accuracy = {name: marks[name].nanmean().item() for name in ATTRIBUTES}
    print("held-out prompts, base model:", json.dumps(accuracy))
    note(work, held_out_accuracy=accuracy, held_out_prompts=len(prompts))


def note(work: Path, **figures: object) -> None:
    path = work / "build.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **figures}, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "assets")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tiny", help="state of unfinished stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--unet-steps", type=int, nargs=3, default=(6000, 3000, 2600), help="of its three phases")
    parser.add_argument("--reconstructions", type=int, default=512, help="held-out pictures to judge the decoder by")
    parser.add_argument("--reward-steps", type=int, default=1000)
    parser.add_argument(
        "--pictures", type=int, default=32000, help="rendered for the denoiser; a quarter for the others"
    )
    parser.add_argument("--reward-prompts", type=int, default=400)
    parser.add_argument("--pair-prompts", type=int, default=800)
    parser.add_argument("--measure-prompts", type=int, default=500)
    size = parser.parse_args(argv)
    size.work.mkdir(parents=True, exist_ok=True)
    size.out.mkdir(parents=True, exist_ok=True)
    model, reward = size.out / "tiny", size.out / "tiny_clip"

    note(
        size.work, seed=size.seed, torch=torch.__version__, machine=platform.machine(), threads=torch.get_num_threads()
    )
    for stage in (
        lambda: build_pipeline(size.work, model, build_vae(size.work, size), size),
        lambda: measure(size.work, model, size),
        lambda: build_reward(size.work, model, reward, size),
        lambda: build_pairs(size.work, model, reward, size.out / "tiny_pairs.parquet", size),
    ):
        start = time.monotonic()
        stage()
        print(f"{(time.monotonic() - start) / 60:.1f} minutes")
    (model / "build.json").write_text((size.work / "build.json").read_text())


if __name__ == "__main__":
    main()
