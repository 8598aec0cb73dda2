"""The passes of encoding. Every rank does its own shards, and all meet after each chunk of work.

1. `encode_prompts` encodes the prompts.
2. `write_digests` reads every picture and writes its digest. From all digests, every rank knows by itself which shard
   meets a picture first, and which number the picture has.
3. `picture_pass` encodes each picture in the shard that meets it first.
4. `list_pictures`, on one rank, writes which pictures each row has.

No result depends on which rank does which shard: noise is that of a picture's number, batches are those of its rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.disk import digest, write_bytes
from diffusion_align.data.frames import Frame, fit, told_sizes
from diffusion_align.data.images import ImageError, decode_image, size_of
from diffusion_align.data.picture_numbers import UNREAD, PictureNumbers, digests_path
from diffusion_align.data.rows.raw_rows import StoredPicture, read_bytes
from diffusion_align.data.shards import VALUES, EncodingJob, finished_shard, write_shard
from diffusion_align.picture_size import sides

# Lists whose crops are in memory together, fewer if each has several; the largest batch for the VAE is K times that.
LISTS_AT_A_TIME = 16
_PROMPTS_AT_A_TIME = 64


def run_pass(
    job: EncodingJob, sizes: Mapping[int, int], work_on: Callable[[int], Iterator[int]], report: Callable[[int], object]
) -> None:
    """Do this rank's shards of a pass. Ranks meet after each chunk, so that no rank waits for hours.

    Args:
        sizes: how many items each of this rank's shards has.
        work_on: does a shard; yields after each chunk but the last how many of its items are done.
        report: is told how many items all ranks have done.
    """
    every = rest = job.ranks.total(sum(sizes.values()))
    left = _items_left(sizes, work_on)
    while rest:
        rest = job.ranks.total(next(left, 0))
        report(every - rest)


def _items_left(sizes: Mapping[int, int], work_on: Callable[[int], Iterator[int]]) -> Iterator[int]:
    left = sum(sizes.values())
    for shard, size in sizes.items():
        for done in work_on(shard):
            yield left - done
        left -= size
        yield left


def encode_prompts(job: EncodingJob, shard: int) -> Iterator[int]:
    """Encode the prompts of a shard."""
    prompts, name, texts = job.texts(shard), f"text-{shard:05d}", []
    if finished_shard(job.home, name) is not None:
        return
    for first in range(0, len(prompts), _PROMPTS_AT_A_TIME):
        if first:
            yield first
        texts.append(job.model.encode_text(prompts[first : first + _PROMPTS_AT_A_TIME]).to(job.settings.dtype))
    write_shard(job.home, name, torch.cat(texts), {})


def write_digests(job: EncodingJob, shard: int) -> Iterator[int]:
    """Write the digests of a shard's pictures."""
    path, rows, digests = digests_path(job, shard), job.rows(shard), []
    if path.is_file():
        return
    for i in rows:
        data = [_read(picture) for picture in job.lists[i].pictures]
        digests.append(_names(job, i, data))
        if len(digests) % LISTS_AT_A_TIME == 0 and len(digests) < len(rows):
            yield len(digests)
    write_bytes(path, json.dumps(digests).encode())


def _names(job: EncodingJob, i: int, data: list[bytes | str]) -> list[str]:
    """The names of a list's pictures, for each variant: their digests, with a frame if there is a choice of frames."""
    names = [digest(d) if isinstance(d, bytes) else d for d in data]
    if job.settings.frames is None:
        return names
    sizes = [size_of(d) if isinstance(d, bytes) else None for d in data]
    frames = job.settings.frames.of_list(sizes, job.settings.seed, i)
    return [name if name.startswith(UNREAD) else f"{name} {frame}" for frame in frames for name in names]


def forget_digests(job: EncodingJob) -> None:
    """Remove the files of `write_digests`."""
    for shard in job.list_shards:
        digests_path(job, shard).unlink(missing_ok=True)


def picture_pass(
    job: EncodingJob, numbers: PictureNumbers, check: Callable[[list[BadRow]], None]
) -> Callable[[int], Iterator[int]]:
    """What encodes the pictures of a shard. After each shard `check` is given the bad rows that this rank knows of."""
    bad: list[BadRow] = []
    broken: dict[str, str] = {}

    def work_on(shard: int) -> Iterator[int]:
        rows, facts = job.rows(shard), finished_shard(job.home, job.name(shard))
        if facts is None:
            latents: dict[str, list[Tensor]] = {}
            at_a_time = max(1, LISTS_AT_A_TIME // job.variants)
            facts = {"digests": [], "broken": {}} | ({"rows": [], "told": []} if job.settings.frames else {})
            with ThreadPoolExecutor(4) as pool:
                for start in range(rows.start, rows.stop, at_a_time):
                    if start > rows.start:
                        yield start - rows.start
                    new = numbers.first_met(job, range(start, min(start + at_a_time, rows.stop)))
                    for key, some in _encode(job, numbers, new, pool, facts):
                        latents.setdefault(key, []).append(some)
            stored = {key: torch.cat(some).to(job.settings.dtype) for key, some in latents.items()}
            empty = {VALUES: torch.empty(0, *job.latent_shape, dtype=job.settings.dtype)}
            write_shard(job.home, job.name(shard), stored or empty, facts)
        broken.update(facts["broken"])
        bad.extend(row for i in rows if (row := numbers.bad_row(job, i, broken)) is not None)
        check(bad)

    return work_on


def _encode(
    job: EncodingJob,
    numbers: PictureNumbers,
    new: dict[int, StoredPicture],
    pool: ThreadPoolExecutor,
    facts: dict[str, Any],
) -> Iterator[tuple[str, Tensor]]:
    """Latents of the pictures that can be decoded, by the key of their shape; names, rows and sizes go into facts."""
    decode = partial(_decode, resolution=job.settings.resolution, home=job.home)
    names = [numbers.digests[number] for number in new]
    good: dict[str, list[tuple[int, Tensor]]] = {}
    rows = Counter(key for key, _ in facts.get("rows", []))
    for number, name, decoded in zip(new, names, pool.map(decode, names, new.values()), strict=True):
        if isinstance(decoded, str):
            facts["broken"][name] = decoded
            continue
        picture, told = decoded
        facts["digests"].append(name)
        key = VALUES if job.settings.frames is None else f"{picture.shape[2]}x{picture.shape[1]}"
        if job.settings.frames is not None:
            facts["rows"].append([key, rows[key]])
            facts["told"].append(told)
            rows[key] += 1
        good.setdefault(key, []).append((number, picture))
    for key, some in good.items():
        pictures = torch.stack([picture for _, picture in some])
        shape = job.model.latent_shape(job.settings.resolution)
        if job.settings.frames is not None:
            factor = sides(job.settings.resolution)[0] // shape[2]
            shape = (shape[0], pictures.shape[2] // factor, pictures.shape[3] // factor)
        noise = rng.normal_batch(shape, job.settings.seed, "vae", [number for number, _ in some])
        yield key, job.model.encode_images(pictures, noise).cpu()


def _decode(name: str, stored: StoredPicture, *, resolution: int | str, home: Path) -> tuple[Tensor, list[int]] | str:
    """A picture in its frame, and what SDXL is told of its sizes; or why it cannot be decoded."""
    data = _read(stored)
    own, _, framed = name.partition(" ")
    if isinstance(data, str) or digest(data) != own:
        raise DataError(f"{stored}: has changed since encoding began; delete {home} and start again")
    frame = Frame.read(framed) if framed else Frame(*sides(resolution))
    try:
        image = decode_image(data)
    except ImageError as error:
        return str(error)
    return fit(image, frame), told_sizes(image.size, frame)


def _read(picture: StoredPicture) -> bytes | str:
    """The bytes of a picture, or the reason why it cannot be read."""
    try:
        return read_bytes(picture)
    except (DataError, OSError) as error:
        return f"{UNREAD} ({error})"


def list_pictures(job: EncodingJob, numbers: PictureNumbers) -> Iterator[tuple[list[int], list[BadRow]]]:
    """Write into each shard's facts which pictures its rows have; yields its good rows' places and its bad rows."""
    place = {prompt: index for index, prompt in enumerate(job.prompts)}
    index: dict[str, int] = {}
    broken: dict[str, str] = {}
    for shard in job.list_shards:
        path = job.home / f"{job.name(shard)}.json"
        facts = json.loads(path.read_text(encoding="utf-8"))
        first = len(index)
        index |= {name: first + row for row, name in enumerate(facts["digests"])}
        broken |= facts["broken"]
        facts |= {"pairs": [], "kept": [], "bad": []}
        bad = []
        for i in job.rows(shard):
            row = numbers.bad_row(job, i, broken)
            if row is None:
                found = [index[numbers.digests[int(number)]] for number in numbers.of[i]]
                facts["kept"].append(i)
                facts["pairs"].append([*found, place[job.lists[i].prompt]])
            else:
                facts["bad"].append([row.row, row.reason])
                bad.append(row)
        write_bytes(path, json.dumps(facts).encode())
        yield facts["kept"], bad
