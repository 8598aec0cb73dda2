"""What tests need of the machine: ports that nobody else takes, and how long to wait before a test counts as hung."""

import random
import socket

import torch

# It bounds a test that hangs and decides nothing else: a machine may be as slow and as busy as it likes.
HANG = 300  # seconds


def free_port():
    """A port below those that the system gives to connections, so that none of them takes it before it is used."""
    chance = random.SystemRandom()  # tests that run side by side must not draw the same ones
    while True:
        port = chance.randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def assert_rounded(found, expected, depth):
    """Equal but for rounding: `depth` operations in a row, each off by an ulp of the largest entry.

    For results of one network on two ways (another batch size, another order of summation), in their own precision. As
    errors of both signs come together, it leaves room for some ulps an operation. Depths are counted roughly: a small
    CLIP 50, a small UNet or VAE 100 to 200.
    """
    found, expected = found.detach(), expected.detach()
    scale = max(float(expected.abs().max()), float(found.abs().max()))
    atol = depth * torch.finfo(expected.dtype).eps * scale
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
