"""D3PO on the model's own pictures and a reward, without the command line: a program to copy and change.

    python examples/train_d3po.py --model tiny --reward tiny --steps 50 --out runs/example-d3po

By default it trains the embedded model on captions of the embedded world. Nothing is downloaded, and a CPU is enough.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from diffusion_align.methods.d3po import d3po_method
from diffusion_align.methods.shared.rollouts import Rollouts, reward_of_latents
from diffusion_align.methods.shared.runs import Prompted, Runs, binder, draw_runs, scored
from diffusion_align.methods.shared.start_checks import along_runs, arithmetic
from diffusion_align.models import add_lora, load_pipeline, reference, save_lora
from diffusion_align.rewards import load_reward
from diffusion_align.samplers import step_table
from diffusion_align.shapes import sample_captions
from diffusion_align.train.method import Sample
from diffusion_align.train.rounds import RoundSizes, run_rounds
from diffusion_align.train.run import Run
from diffusion_align.vocabulary import LORA_TARGETS

BETA, CLIP = 1.0, 0.1  # on log-ratios averaged over the latent's dims, as published
SAMPLER_STEPS = 6
GUIDANCE = 1.0  # none
PROMPTS_PER_CHUNK = 8  # in the network at a time: memory follows it
RANK, TARGET_LAYERS = 16, LORA_TARGETS["wide"]
LEARNING_RATE = 1e-3
SEED = 0


def main(argv: list[str] | None = None) -> list[float]:
    """Train, write the LoRA to --out, and return the loss of every step."""
    parser = argparse.ArgumentParser(description="D3PO on the model's own pictures")
    parser.add_argument("--model", default="tiny", help="folder or hub id in diffusers format, or tiny")
    parser.add_argument("--reward", default="tiny", help="any name of `diffusion-align reward ls`")
    parser.add_argument("--prompts", type=Path, help="a file with one prompt a line; default: the embedded captions")
    parser.add_argument("--prompts_per_round", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps, one a round")
    parser.add_argument("--out", type=Path, default=Path("runs/example-d3po"))
    args = parser.parse_args(argv)
    prompts = args.prompts.read_text("utf-8").splitlines() if args.prompts else sample_captions(1000, SEED)

    # The model. A LoRA is what trains; the reference is the same network with the LoRA switched off.
    accelerator = Accelerator()
    model = load_pipeline(args.model, device=accelerator.device)
    parameters = add_lora(model.unet, RANK, targets=TARGET_LAYERS, seed=SEED)
    noise_model = model.schedule, model.prediction_type
    policy = binder(model.predict, *noise_model, model.empty_text, GUIDANCE)
    frozen = binder(reference(model, "lora"), *noise_model, model.empty_text, GUIDANCE)

    # The sampler. eta is its noise: a step without noise has no density, and nothing can be learnt from it.
    table = step_table(model.schedule, SAMPLER_STEPS, solver="dpmpp", order=2, eta=1.0)
    shape = model.latent_shape()

    def draw(samples: list[Sample], _: int) -> Runs:
        words = [prompts[index] for _, index in samples]
        asked = Prompted(words, model.encode_text(words), samples)
        return draw_runs(
            policy, frozen, table, asked, group=args.pictures, share_noise=True, shape=shape, seed=SEED
        )  # fmt: skip

    # The reward: pictures [B,3,H,W] in [0, 1] and B prompts -> [B]. A function of your own can take its place.
    score = reward_of_latents(model, load_reward(args.reward, device=model.device, seed=SEED), chunk=32)
    dims = math.prod(shape)
    allowed = along_runs(arithmetic(accelerator), table, dims, GUIDANCE, model.prediction_type)
    rollouts = Rollouts(draw, policy, frozen, dims, allowed, score=partial(scored, score=score))

    # The run: what is trained, with which optimizer, and for how long.
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(parameters, optimizer, None, accelerator, SEED, args.steps)
    sizes = RoundSizes(len(prompts), args.prompts_per_round, args.prompts_per_round, PROMPTS_PER_CHUNK)
    method = d3po_method(rollouts, beta=BETA, clip=CLIP, per_dim=True)

    losses = []
    for record in run_rounds(method, run, sizes):
        losses.append(record.loss)
        print(f"step {record.step}  loss {record.loss:.4f}  reward {record.metrics['reward_mean']:.3f}")
    print("written:", save_lora(model.unet, args.out))
    return losses


if __name__ == "__main__":
    main()
