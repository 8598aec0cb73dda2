"""Signal and noise in an online method's gradient: the group-relative policy gradient at the embedded base model.

    python scripts/bench_gradient_noise.py                 # some minutes on two CPU cores
    python scripts/bench_gradient_noise.py --batches 32    # a more precise answer

For N independent batches with gradients g_i it prints |mean|^2 / |one batch's deviation|^2 for each step and for all
steps together, and network evaluations a batch. The mean's square is the unbiased sum over i != j of <g_i, g_j>. The
inverse of the ratio is the number of batches that an update needs until half of its direction is signal; a negative
ratio means that it cannot be distinguished from 0. Trajectories have noise in all steps, or in one of six as in the
presets `tiny`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from diffusion_align.commands.train.items import TINY_SEED
from diffusion_align.methods.ddpo import learn_policy_gradient
from diffusion_align.methods.shared.rollouts import reward_of_latents
from diffusion_align.methods.shared.runs import Prompted, Runs, binder, draw_runs, scored
from diffusion_align.models import add_lora, load_pipeline
from diffusion_align.rewards import load_reward
from diffusion_align.samplers import StepTable, noise_window, step_table
from diffusion_align.shapes import sample_captions
from diffusion_align.vocabulary import LORA_TARGETS


def signal_share(gradients: Tensor) -> float:
    """|mean|^2 over |deviation|^2 of one of N gradients [N,P], both without bias."""
    n = len(gradients)
    own = gradients.square().sum()
    mean = (gradients.sum(0).square().sum() - own) / (n * (n - 1))
    return float(mean / (own / n - mean))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16, help="of a batch")
    parser.add_argument("--group_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--reward", default="tiny")
    args = parser.parse_args(argv)

    model = load_pipeline("tiny")
    parameters = add_lora(model.unet, 16, targets=LORA_TARGETS["wide"])
    calls = [0]

    def counted(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        calls[0] += len(x)
        return model.predict(x, t, text)

    policy = binder(counted, model.schedule, model.prediction_type, model.empty_text, 1.0)
    score = reward_of_latents(model, load_reward(args.reward, device=model.device, seed=0), 64)
    captions = sample_captions(args.batches * args.prompts, TINY_SEED)

    def gradient(runs: Runs, k: int) -> Tensor:
        """Of step k alone; the base is its own reference here, as nothing is pulled towards it."""
        alone = replace(runs.trajectory.table, stochastic=torch.arange(len(runs.trajectory.table)) == k)
        for parameter in parameters:
            parameter.grad = None
        learn_policy_gradient(replace(runs, trajectory=replace(runs.trajectory, table=alone)), policy, 1.0, clip=0.5)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return torch.cat([grad.flatten() for grad in grads])

    def measure(name: str, table: StepTable, group: int, share: bool) -> None:
        steps = table.stochastic.nonzero().flatten().tolist()
        rows = []
        calls[0] = 0
        for i in range(0, len(captions), args.prompts):
            samples = [(0, j) for j in range(i, i + args.prompts)]
            prompts = captions[i : i + args.prompts]
            prompted = Prompted(prompts, model.encode_text(prompts), samples)
            runs = draw_runs(
                policy, None, table, prompted, group=group, share_noise=share, shape=model.latent_shape(), seed=1
            )
            runs = scored(runs, score)
            rows.append(torch.stack([gradient(runs, k) for k in steps]))
        every = torch.stack(rows)  # [batches, steps, parameters]
        by_step = " ".join(f"{signal_share(every[:, i]):+.3f}" for i in range(len(steps)))
        cost = calls[0] // args.batches
        print(f"{name}: by step {by_step}; all {signal_share(every.sum(1)):+.4f}; {cost} evaluations", flush=True)

    whole = step_table(model.schedule, args.steps, order=2, eta=1.0)
    measure("noise in all steps, one start a prompt", whole, args.group_size, True)
    measure("noise in all steps, a start each", whole, args.group_size, False)
    few, quiet = (step_table(model.schedule, 6, order=2, eta=eta) for eta in (1.0, 0.0))
    for k in (1, 2, 3):
        measure(f"6 steps, noise in step {k}", noise_window(few, quiet, k, 1), 2 * args.group_size, True)


if __name__ == "__main__":
    main()
