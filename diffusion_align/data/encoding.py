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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.disk import digest, write_bytes
from diffusion_align.data.images import ImageError, load_picture
from diffusion_align.data.pairs_and_rankings import Pair
from diffusion_align.data.rows.raw_rows import StoredPicture, read_bytes
from diffusion_align.data.shards import EncodingJob, finished_shard, write_shard

# Lists whose bytes are in memory together; the largest batch for the VAE is K times that.
LISTS_AT_A_TIME = 16
_PROMPTS_AT_A_TIME = 64
_UNREAD = "cannot be read"  # no digest begins with it


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
    path, rows, digests = _digests_path(job, shard), job.rows(shard), []
    if path.is_file():
        return
    for i in rows:
        data = [_read(picture) for picture in job.lists[i].pictures]
        digests.append([digest(d) if isinstance(d, bytes) else d for d in data])
        if len(digests) % LISTS_AT_A_TIME == 0 and len(digests) < len(rows):
            yield len(digests)
    write_bytes(path, json.dumps(digests).encode())


def forget_digests(job: EncodingJob) -> None:
    """Remove the files of `write_digests`."""
    for shard in job.list_shards:
        _digests_path(job, shard).unlink(missing_ok=True)


def _digests_path(job: EncodingJob, shard: int) -> Path:
    return job.home / f"names-{shard:05d}.json"


@dataclass(frozen=True)
class PictureNumbers:
    """The pictures of all lists, numbered in the order in which they are first met.

    Attributes:
        of: [lists][K], the number of each picture, or the reason why it cannot be read.
        before: [lists], how many pictures are met before a list.
        digests: of each picture, by number.
    """

    of: list[list[int | str]]
    before: list[int]
    digests: list[str]

    @classmethod
    def read(cls, job: EncodingJob) -> PictureNumbers:
        """From the digests of all shards."""
        number: dict[str, int] = {}
        of: list[list[int | str]] = []
        before = []
        for shard in job.list_shards:
            for row in json.loads(_digests_path(job, shard).read_text(encoding="utf-8")):
                before.append(len(number))
                of.append([d if d.startswith(_UNREAD) else number.setdefault(d, len(number)) for d in row])
        return cls(of, before, list(number))

    def first_met(self, job: EncodingJob, rows: range) -> dict[int, StoredPicture]:
        """The pictures that are met in these rows and not before, in order."""
        new: dict[int, StoredPicture] = {}
        for i in rows:
            for number, picture in zip(self.of[i], job.lists[i].pictures, strict=True):
                if isinstance(number, int) and number >= self.before[rows.start]:
                    new.setdefault(number, picture)
        return new

    def bad_row(self, job: EncodingJob, i: int, broken: Mapping[str, str]) -> BadRow | None:
        """What is wrong with a row. `broken`: digests of broken pictures, and why they are."""
        entry = job.lists[i]
        why = [number if isinstance(number, str) else broken.get(self.digests[number]) for number in self.of[i]]
        sides = ("winner", "loser") if isinstance(entry, Pair) else [f"picture {k}" for k in range(len(why))]
        reasons = [
            f"{side} ({picture}) {reason}" if isinstance(picture, Path) else f"{side} {reason}"
            for side, picture, reason in zip(sides, entry.pictures, why, strict=True)
            if reason is not None
        ]
        return BadRow(entry.id, "; ".join(reasons)) if reasons else None


def picture_pass(
    job: EncodingJob, numbers: PictureNumbers, check: Callable[[list[BadRow]], None]
) -> Callable[[int], Iterator[int]]:
    """What encodes the pictures of a shard. After each shard `check` is given the bad rows that this rank knows of."""
    bad: list[BadRow] = []
    broken: dict[str, str] = {}

    def work_on(shard: int) -> Iterator[int]:
        rows, facts = job.rows(shard), finished_shard(job.home, job.name(shard))
        if facts is None:
            latents, facts = [torch.empty(0, *job.latent_shape)], {"digests": [], "broken": {}}
            with ThreadPoolExecutor(4) as pool:
                for start in range(rows.start, rows.stop, LISTS_AT_A_TIME):
                    if start > rows.start:
                        yield start - rows.start
                    new = numbers.first_met(job, range(start, min(start + LISTS_AT_A_TIME, rows.stop)))
                    latents += _encode(job, numbers, new, pool, facts)
            write_shard(job.home, job.name(shard), torch.cat(latents).to(job.settings.dtype), facts)
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
) -> list[Tensor]:
    """Latents of the pictures that can be decoded, if any; the digests of all go into the facts."""
    decode = partial(_decode, resolution=job.settings.resolution, home=job.home)
    digests = [numbers.digests[number] for number in new]
    good, good_numbers = [], []
    for number, name, picture in zip(new, digests, pool.map(decode, digests, new.values()), strict=True):
        if isinstance(picture, str):
            facts["broken"][name] = picture
        else:
            facts["digests"].append(name)
            good_numbers.append(number)
            good.append(picture)
    if not good:
        return []
    noise = rng.normal_batch(job.latent_shape, job.settings.seed, "vae", good_numbers)
    return [job.model.encode_images(torch.stack(good), noise).cpu()]


def _decode(name: str, picture: StoredPicture, *, resolution: int, home: Path) -> Tensor | str:
    data = _read(picture)
    if isinstance(data, str) or digest(data) != name:
        raise DataError(f"{picture}: has changed since encoding began; delete {home} and start again")
    try:
        return load_picture(data, resolution)
    except ImageError as error:
        return str(error)


def _read(picture: StoredPicture) -> bytes | str:
    """The bytes of a picture, or the reason why it cannot be read."""
    try:
        return read_bytes(picture)
    except (DataError, OSError) as error:
        return f"{_UNREAD} ({error})"


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
