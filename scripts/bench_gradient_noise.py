"""How much of an online method's gradient is signal: at the embedded base, for the group-relative policy gradient.

    python scripts/bench_gradient_noise.py                 # some minutes on two CPU cores
    python scripts/bench_gradient_noise.py --batches 32    # a sharper answer

For N independent batches with gradients g_i it prints |mean|^2 / |one batch's deviation|^2, the mean's square by the
unbiased sum over i != j of <g_i, g_j>, for each step of the runs and for all together. One over it is how many batches
an update needs before its direction is half signal; a negative number is one that cannot be told from 0.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from diffusion_align.commands.plan_online import TINY_SEED
from diffusion_align.commands.score import decoded, reward_by_name
from diffusion_align.models import add_lora, load_pipeline
from diffusion_align.models.adapters import TARGETS
from diffusion_align.samplers import step_table
from diffusion_align.shapes import sample_captions
from diffusion_align.train.runs import Runs, binder, draw_runs
from diffusion_align.train.step_losses import learn_policy_gradient


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

    gate = load_pipeline("tiny")
    parameters = add_lora(gate.unet, 16, targets=TARGETS["wide"])
    policy = binder(gate.predict, gate.schedule, gate.prediction_type, gate.empty_text, 1.0)
    table = step_table(gate.schedule, args.steps, order=2, eta=1.0)
    score = decoded(gate, reward_by_name(args.reward, device=gate.device, seed=0), 64)
    captions = sample_captions(args.batches * args.prompts, TINY_SEED)

    def gradient(runs: Runs, k: int) -> Tensor:
        """Of step k alone; the base is its own reference here, as nothing is pulled towards it."""
        alone = replace(table, stochastic=torch.arange(len(table)) == k)
        for parameter in parameters:
            parameter.grad = None
        learn_policy_gradient(replace(runs, trajectory=replace(runs.trajectory, table=alone)), policy, 1.0, clip=0.5)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return torch.cat([grad.flatten() for grad in grads])

    for share in (True, False):
        rows = []
        for i in range(0, len(captions), args.prompts):
            samples = [(0, j) for j in range(i, i + args.prompts)]
            prompts = captions[i : i + args.prompts]
            runs = draw_runs(
                policy, None, table, gate.encode_text(prompts), prompts, samples, score,
                group=args.group_size, share_noise=share, shape=gate.latent_shape(), seed=1,
            )  # fmt: skip
            rows.append(torch.stack([gradient(runs, k) for k in range(len(table) - 1)]))
        every = torch.stack(rows)  # [batches, steps, parameters]
        by_step = " ".join(f"{signal_share(every[:, k]):+.3f}" for k in range(every.shape[1]))
        start = "one start a prompt" if share else "a start each"
        print(f"{start}: by step {by_step}; all steps {signal_share(every.sum(1)):+.4f}", flush=True)


if __name__ == "__main__":
    main()
