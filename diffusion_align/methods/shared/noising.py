"""Noised pictures and their squared errors, for methods that learn from given pictures.

`noised_lists` and `denoising_errors` work for rankings of any K pictures. A pair is one of K = 2, the winner first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.prediction import add_noise, target
from diffusion_align.schedule import Schedule
from diffusion_align.tensors import sum_dims
from diffusion_align.train.method import Sample

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(x [B,...], t [B], text [B,L,E]) -> the network's output [B,...]`, float32."""


@dataclass(frozen=True, eq=False)
class Networks:
    """The trained network, its frozen reference (None for a loss without one), and their noise schedule.

    told_sizes: whether the text of a picture ends with its sizes, in place of those of its latents (SDXL).
    """

    policy: Predict
    reference: Predict | None
    schedule: Schedule
    prediction_type: str
    told_sizes: bool = False


class Noised(NamedTuple):
    """B noised pairs or rankings as one batch of K*B rows: all first entries, then all second ones, and so on."""

    x: Tensor
    t: Tensor
    text: Tensor
    target: Tensor
    entries: int


class Cache(Protocol):
    """What methods ask of the cache of given pictures; `data.PairCache`."""

    empty_text: Tensor
    groups: list[int] | None
    variants: int

    def __len__(self) -> int: ...
    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> tuple[Tensor, Tensor]: ...
    def told(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> Tensor: ...


class Picked(NamedTuple):
    """Latents [B,K,C,h,w], text [B,L,E] and, if the network is told the sizes of pictures, these [B,K,6]."""

    latents: Tensor
    text: Tensor
    told: Tensor | None


def pick(cache: Cache, samples: Sequence[Sample], networks: Networks, seed: int) -> Picked:
    """What the cache has of these samples. Which crop of a picture is taken is addressed by (epoch, index)."""
    indices, variants = [index for _, index in samples], None
    if cache.variants > 1:
        variants = rng.integers_batch(0, cache.variants, seed, "variant", list(samples)).tolist()
    latents, text = cache.batch(indices, variants)
    return Picked(latents, text, cache.told(indices, variants) if networks.told_sizes else None)


def noised_lists(
    latents: Tensor,
    text: Tensor,
    samples: Sequence[Sample],
    networks: Networks,
    seed: int,
    *,
    shared_noise: bool = True,
    told: Tensor | None = None,
) -> Noised:
    """Noise latents [B,K,C,h,w] with one timestep and one noise per row, addressed by (epoch, index).

    Timesteps are uniform over 0..N-1. The pictures of a pair share timestep and noise as in the pseudo-code of
    Diffusion-DPO's paper, so the margin depends on the pictures only. Without `shared_noise` each picture has its own
    noise, at (epoch, index, picture), as in RankDPO (Karthik et al. 2024, arXiv 2410.18013, eq. 5). `told` [B,K,6] are
    the sizes of the pictures, for the last row of their texts.
    """
    batch, entries = latents.shape[:2]
    addresses = list(samples)
    t = rng.integers_batch(0, networks.schedule.num_timesteps, seed, "timestep", addresses)
    # All first entries, then all second ones: the order of the rows.
    places = addresses * entries if shared_noise else [(*a, entry) for entry in range(entries) for a in addresses]
    drawn = {place: rng.normal(latents.shape[2:], seed, "noise", *place) for place in dict.fromkeys(places)}
    noise = torch.stack([drawn[place] for place in places]).to(latents)
    levels = networks.schedule.alpha(t), networks.schedule.sigma(t)
    alpha, sigma = (level.to(latents).repeat(entries) for level in levels)
    text = text.repeat(entries, *[1] * (text.ndim - 1))
    if told is not None:
        text[:, -1, : told.shape[-1]] = told.transpose(0, 1).flatten(0, 1).to(text)
    clean = latents.transpose(0, 1).reshape(entries * batch, *latents.shape[2:])
    return Noised(
        x=add_noise(clean, noise, alpha, sigma),
        t=t.to(latents.device).repeat(entries),
        text=text,
        target=target(clean, noise, alpha, sigma, networks.prediction_type),
        entries=entries,
    )


def denoising_errors(predict: Predict, noised: Noised) -> Tensor:
    """Squared errors of one call of the network on the whole batch, summed over dims in float32 -> [B,K]."""
    output = predict(noised.x, noised.t, noised.text)
    errors = sum_dims((output.to(torch.float32) - noised.target.to(torch.float32)).square())
    return errors.view(noised.entries, -1).T


def drop_captions(text: Tensor, empty: Tensor, samples: Sequence[Sample], probability: float, seed: int) -> Tensor:
    """Replace each text [B,L,E] by the empty prompt [1,L,E] with this probability, addressed by (epoch, index)."""
    if probability == 0:
        return text
    dropped = rng.uniform_batch(seed, "caption", list(samples)) < probability
    return torch.where(dropped.to(text.device)[:, None, None], empty.to(text), text)
