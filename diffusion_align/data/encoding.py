"""The encoders' work, shared out over the processes of a job, a shard to one of them.

Nothing here depends on who does which shard: noise is that of a picture's number, batches are those of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.data.encoding_job import CHUNK, Job
from diffusion_align.data.encoding_names import Names, read_picture
from diffusion_align.data.images import ImageError, load_picture
from diffusion_align.data.layouts import Picture
from diffusion_align.data.raw_rows import BadRow, DataError, digest
from diffusion_align.data.shards import known_shard, write_shard

_PROMPTS = 64  # encoded at a time


def encode_texts(job: Job) -> tuple[int, Iterator[int]]:
    """How many prompts are this process's, and the work of encoding them."""
    size = job.per_shard[1]
    mine = {shard: job.prompts[shard * size :][:size] for shard in job.share.of(job.text_shards)}
    count = sum(map(len, mine.values()))

    def work() -> Iterator[int]:
        left = count
        for shard, prompts in mine.items():
            name, parts = f"text-{shard:05d}", []
            if known_shard(job.home, name) is None:
                for first in range(0, len(prompts), _PROMPTS):
                    if parts:
                        yield left - first
                    parts.append(job.model.encode_text(prompts[first : first + _PROMPTS]).to(job.dtype))
                write_shard(job.home, name, torch.cat(parts), {})
            left -= len(prompts)
            yield left

    return count, work()


def encode_pictures(job: Job, names: Names, check: Callable[[list[BadRow]], None]) -> tuple[int, Iterator[int]]:
    """How many lists are this process's, and the work of encoding the pictures that their shards are the first to meet.
    After each shard `check` is given the broken rows that this process knows of."""
    mine = job.share.of(job.list_shards)
    count = sum(len(job.rows(shard)) for shard in mine)

    def work() -> Iterator[int]:
        left, bad, broken = count, [], {}
        for shard in mine:
            rows, facts = job.rows(shard), known_shard(job.home, job.name(shard))
            if facts is None:
                latents, facts = (
                    [torch.empty(0, *job.model.latent_shape(job.resolution))],
                    {"digests": [], "broken": {}},
                )
                with ThreadPoolExecutor(4) as pool:
                    for start in range(rows.start, rows.stop, CHUNK):
                        if start > rows.start:
                            yield left - (start - rows.start)
                        new = names.met_first(job, range(start, min(start + CHUNK, rows.stop)))
                        latents += _encode(job, names, new, pool, facts)
                write_shard(job.home, job.name(shard), torch.cat(latents).to(job.dtype), facts)
            broken |= facts["broken"]
            bad += [row for i in rows if (row := names.bad_row(job, i, broken)) is not None]
            check(bad)
            left -= len(rows)
            yield left

    return count, work()


def _encode(
    job: Job, names: Names, new: dict[int, Picture], pool: ThreadPoolExecutor, facts: dict[str, Any]
) -> list[Tensor]:
    """Latents of those of some pictures that can be decoded, if any; which they are goes into the facts."""
    decode = partial(_decode, resolution=job.resolution, home=job.home)
    digests = [names.digests[number] for number in new]
    good, numbers = [], []
    for number, name, picture in zip(new, digests, pool.map(decode, digests, new.values()), strict=True):
        if isinstance(picture, str):
            facts["broken"][name] = picture
        else:
            facts["digests"].append(name)
            numbers.append(number)
            good.append(picture)
    if not good:
        return []
    noise = rng.normal_batch(job.model.latent_shape(job.resolution), job.seed, "vae", numbers)
    return [job.model.encode_images(torch.stack(good), noise).cpu()]


def _decode(name: str, picture: Picture, *, resolution: int, home: Path) -> Tensor | str:
    data = read_picture(picture)
    if isinstance(data, str) or digest(data) != name:
        raise DataError(f"{picture}: has changed since encoding began; delete {home} and start again")
    try:
        return load_picture(data, resolution)
    except ImageError as error:
        return str(error)
