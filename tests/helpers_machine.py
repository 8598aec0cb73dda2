"""What tests need of the machine: ports that nobody else takes, and how long to wait before a test counts as hung."""

import random
import socket

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
