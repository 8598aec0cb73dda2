"""Diffusion-DPO on preference pairs, without the command line: a program to copy and change.

    python examples/train_dpo.py --model tiny --steps 100 --out runs/example-dpo

By default it trains the embedded model on the embedded pairs. Nothing is downloaded, and a CPU is enough.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from diffusion_align.data import EncodingSettings, build_cache, read_pairs
from diffusion_align.methods.dpo import pairs_method
from diffusion_align.methods.shared.noising import Networks
from diffusion_align.methods.shared.pair_losses import on_margin
from diffusion_align.models import add_lora, load_pipeline, reference, save_lora
from diffusion_align.models.hub import asset
from diffusion_align.objectives import beta_per_squared_error, logistic
from diffusion_align.train.run import Run
from diffusion_align.train.steps import run_steps
from diffusion_align.vocabulary import LORA_TARGETS

BETA, CONVENTION = 2000.0, "salesforce"  # the unit of the authors' code
RANK, TARGET_LAYERS = 16, LORA_TARGETS["wide"]
LEARNING_RATE = 4e-4
BATCH_SIZE = 16  # pairs in one optimizer step
SEED = 0


def main(argv: list[str] | None = None) -> list[float]:
    """Train, write the LoRA to --out, and return the loss of every step."""
    parser = argparse.ArgumentParser(description="Diffusion-DPO on preference pairs")
    parser.add_argument("--model", default="tiny", help="folder or hub id in diffusers format, or tiny")
    parser.add_argument("--data", default="tiny", help="pairs on disk, or tiny: the embedded ones")
    parser.add_argument("--pairs", type=int, help="use the first N pairs only")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/example-dpo"))
    args = parser.parse_args(argv)

    # The model. A LoRA is what trains; the reference is the same network with the LoRA switched off.
    accelerator = Accelerator()
    model = load_pipeline(args.model, device=accelerator.device)
    parameters = add_lora(model.unet, RANK, targets=TARGET_LAYERS, seed=SEED)
    networks = Networks(model.predict, reference(model, "lora"), model.schedule, model.prediction_type)

    # The data. Every picture and every prompt is encoded once; a second run finds them in the cache.
    pairs, counts = read_pairs(asset("tiny_pairs.parquet") if args.data == "tiny" else args.data)
    print(counts)
    cache = build_cache(model, pairs[: args.pairs], args.out / "cache", EncodingSettings(model.resolution, SEED))

    # The run: what is trained, with which optimizer, and for how long.
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(parameters, optimizer, None, accelerator, SEED, args.steps)

    # The loss. `logistic` is that of DPO; any function of the margin [b] -> [b] can take its place.
    beta = beta_per_squared_error(BETA, math.prod(model.latent_shape()), CONVENTION)
    loss = on_margin(partial(logistic, beta=beta))
    method = pairs_method(cache, networks, run, loss=loss, beta=beta)

    losses = []
    for record in run_steps(method, run, batch_size=BATCH_SIZE):
        losses.append(record.loss)
        print(f"step {record.step}  loss {record.loss:.4f}  accuracy {record.metrics['implicit_accuracy']:.2f}")
    print("written:", save_lora(model.unet, args.out))
    return losses


if __name__ == "__main__":
    main()
