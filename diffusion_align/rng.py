"""Addressed random numbers: every draw comes from a generator keyed by (seed, purpose, address), such as (7, "noise",
epoch, sample). So resuming is exact, the number of processes does not change the samples, and any draw can be repeated
from its address. Nothing here uses torch's global generator.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

Part = SupportsIndex | str
Address = Part | tuple[Part, ...]

_WORDS = 624  # of the Mersenne Twister behind torch's CPU generator
_FIRST = 3  # int64 slots before those words in the generator's state: seed, (left, seeded), next


def _digest(seed: int, purpose: str, address: tuple[Part, ...]) -> bytes:
    # JSON distinguishes 1 from "1" and (1, 23) from (12, 3), and is the same in all versions and languages.
    parts = [seed, purpose, *address]
    key = json.dumps([part if isinstance(part, str) else operator.index(part) for part in parts])
    return hashlib.shake_256(key.encode()).digest(4 * _WORDS)


def generator(seed: int, purpose: str, *address: Part) -> torch.Generator:
    """A CPU generator for this address alone. Parts of an address are integers or strings; 1 and "1" differ.

    `manual_seed` alone is not enough: torch fills the Mersenne Twister from the lower 32 bits of the seed, so two of
    100 000 draws would most likely be equal. So all 624 words are taken from a hash (SHAKE-256) of the address.
    """
    digest = _digest(seed, purpose, address)
    made = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    state = made.get_state()
    # Bytes of int64 slots. The first word after `manual_seed` is the lower 32 bits of the seed: a check of the layout.
    words = state[8 * _FIRST : 8 * (_FIRST + _WORDS)]
    if words.numel() != 8 * _WORDS or int(words.view(torch.int64)[0]) != int.from_bytes(digest[:4], "little"):
        raise RuntimeError(
            f"torch {torch.__version__} has an unknown layout of its CPU generator's state: install a version that the "
            "requirements of diffusion_align allow"
        )
    words.view(torch.int64).copy_(torch.frombuffer(bytearray(digest), dtype=torch.uint32))
    return made.set_state(state)


def _parts(address: Address) -> tuple[Part, ...]:
    return address if isinstance(address, tuple) else (address,)


def draw_normal(shape: Sequence[int], source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers from `source`; in half precision, the float32 draw rounded."""
    wide = torch.promote_types(dtype, torch.float32)
    return torch.randn(tuple(shape), generator=source, dtype=wide, device=source.device).to(dtype)


def normal(shape: Sequence[int], seed: int, purpose: str, *address: Part, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of this shape, drawn at one address."""
    return draw_normal(shape, generator(seed, purpose, *address), dtype)


def normal_batch(
    shape: Sequence[int], seed: int, purpose: str, addresses: Sequence[Address], dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B,*shape]; row b is `normal(shape, seed, purpose, *addresses[b])`, whatever else is in the batch."""
    rows = [normal(shape, seed, purpose, *_parts(address), dtype=dtype) for address in addresses]
    return torch.stack(rows) if rows else torch.empty((0, *shape), dtype=dtype)


def integers_batch(low: int, high: int, seed: int, purpose: str, addresses: Sequence[Address]) -> Tensor:
    """[B] int64 in [low, high), one draw per address."""
    rows = [torch.randint(low, high, (), generator=generator(seed, purpose, *_parts(address))) for address in addresses]
    return torch.stack(rows) if rows else torch.empty(0, dtype=torch.int64)


def uniform_batch(seed: int, purpose: str, addresses: Sequence[Address]) -> Tensor:
    """[B] float64 in [0, 1), one draw per address."""
    rows = [torch.rand((), generator=generator(seed, purpose, *_parts(a)), dtype=torch.float64) for a in addresses]
    return torch.stack(rows) if rows else torch.empty(0, dtype=torch.float64)


def permutation(n: int, seed: int, purpose: str, *address: Part) -> Tensor:
    """[n] int64, a random order of 0..n-1 drawn at one address."""
    return torch.randperm(n, generator=generator(seed, purpose, *address))
