"""Memory that runs out where a test wants it to."""

import torch
from helpers_online import darkness


def full(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Limited:
    """A network in a memory that holds so many rows; with `after`, only from that call on."""

    def __init__(self, network, rows, after=0):
        self.network, self.rows, self.after, self.calls, self.sizes = network, rows, after, 0, []

    def __call__(self, x, t, text):
        self.calls += 1
        if len(x) > self.rows and self.calls > self.after:
            full()
        self.sizes.append(len(x))
        return self.network(x, t, text)


class FullOnTheWayBack(torch.autograd.Function):
    """Memory that runs out in the backward pass."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if len(gradient) > ctx.rows:
            full()
        return gradient, None


def short_of_memory(toy, name, place):
    """Let two prompts of a toy's rounds fit, but not four, while "drawing", "scoring" or "learning"."""
    two = 12 if name == "spo" else 8  # rows of two prompts: guided, of three children or two runs
    network = toy.policy_calls.network

    def limited(x, t, text):
        learning = torch.is_grad_enabled()
        many = place == "learning" and learning and len(x) > 4 or place == "drawing" and not learning and len(x) > two
        return full() if many else network(x, t, text)

    toy.policy_calls.network = limited
    if place == "scoring":
        toy.reward = lambda x, prompts: full() if len(x) > two / 2 else darkness(x, prompts)
