"""A run to differentiate: an old policy's trajectory, a reference, a policy near the old one; and autograd in full."""

import torch
from helpers_samplers import SD15, noise

from diffusion_align.models.analytic import ToyDenoiser
from diffusion_align.rng import generator
from diffusion_align.samplers import replay, rollout, step_table
from diffusion_align.schedule import Schedule

SCHEDULE = Schedule.from_config(SD15)
PAIRS, STEPS = 3, 7


def toy(seed):
    return ToyDenoiser(6, torch.Generator().manual_seed(seed)).double()


def bind(network, scale):
    """The plain network, or with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) in one call."""
    if scale is None:
        return network

    def guided(x, t):
        classes = torch.tensor([0, 1]).repeat_interleave(len(x))
        empty, prompted = network(x.repeat(2, 1), t.repeat(2), classes).chunk(2)
        return empty + scale * (prompted - empty)

    return guided


def setting(order=2, scale=None, **options):
    """A run of an old policy, the log-probs of a reference, and the network to train, near the old one."""
    table = step_table(SCHEDULE, STEPS, order=order, **options)
    old, ref, policy = toy(0), toy(1), toy(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * noise(*p.shape, seed=9)
    run = rollout(bind(old, scale), table, noise(2 * PAIRS, 6), generator(0, "run"))
    with torch.no_grad():
        reference = replay(bind(ref, scale), run)
    return policy, bind(policy, scale), run, reference


def textbook_log_prob(denoise, run):
    """Full autograd, written out from the table's numbers and torch's Normal: nothing of the package but the table."""
    table, rows, clean = run.table, [], []
    for k in range(STEPS):
        clean.append(denoise(run.states[k], table.timesteps[k].expand(2 * PAIRS)))
        mean = table.cx[k] * run.states[k] + table.c[k, 0] * clean[k]
        if k > 0:
            mean = mean + table.c[k, 1] * clean[k - 1]
        if table.std[k] > 0:
            rows.append(torch.distributions.Normal(mean, table.std[k]).log_prob(run.states[k + 1]).sum(1))
        else:
            rows.append(torch.zeros(2 * PAIRS, dtype=torch.float64))
    return torch.stack(rows)


def gradients(network):
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in network.parameters()]
    )
