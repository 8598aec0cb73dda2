"""The cache of encodings: each picture and each prompt is encoded once.

    <folder>/<key>/text-00000.safetensors    text [N,L,E] of unique prompts
                   pairs-00000.safetensors   latents [M,C,h,w] of the pictures that occur first in this shard of pairs
                   pairs-00000.json          their digests; for each kept pair the numbers of its pictures and prompt
                   names-00000.json          only while encoding: the digests of all pictures of a shard
                   bad_rows.jsonl            the rows left out, with reasons
                   manifest.json             what the cache depends on; written last

Rankings have files rankings-00000 and so on, with K pictures in place of two. Relevance is not stored: rankings of the
same picture files with another relevance have the same cache. A pair's weight, the order of its pictures, or the
content of a parquet file do change the key (`fingerprint`).

The key is a digest of the model, the resolution, the data and the seed, so a changed input gets another folder. The
JSON of a shard is written after its tensors, so a shard with a JSON is complete. An interrupted build continues after
the last complete shard. Two pictures with the same bytes are one picture in the cache, whatever their file or row.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.data import encoding
from diffusion_align.data.bad_rows import BadRow, DataError, bad_row_lines, require_few_bad
from diffusion_align.data.disk import digest, require_room, write_bytes
from diffusion_align.data.pairs_and_rankings import Pair, Ranking, fingerprint
from diffusion_align.data.picture_numbers import PictureNumbers
from diffusion_align.data.rows.tables.json_rows import json_lines
from diffusion_align.data.shards import (
    VALUES,
    Encoders,
    EncodingJob,
    EncodingSettings,
    Ranks,
    Shards,
    finished_shard,
    write_shard,
)
from diffusion_align.data.stored_caches import hold
from diffusion_align.system.progress import total_bar

ONE_RANK = Ranks()
CACHE_FORMAT = 1


class PairCache:
    """Encoded pairs, or rankings, on disk, read by index.

    Attributes:
        identity: all that the encodings depend on (model, resolution, data, seed, precision).
        kept: [len] indices of the kept pairs in the list that the cache was built from; bad rows are left out.
        lengths: [len] number of pictures of each pair or ranking: 2, or K.
        groups: [len] numbers of the shapes of the latents; None if all have one shape.
        variants: how many crops of each picture are encoded.
        pictures: how many different pictures were encoded.
        bad: how many rows were left out; they are listed in bad_rows.jsonl.
        empty_text: [1,L,E] float32, the encoding of the empty prompt, which replaces dropped captions. For SDXL too, as
            in the public code of Diffusion-DPO and related methods; guidance may use zeros instead.
    """

    def __init__(self, folder: Path):
        self._held = hold(folder)  # so that nobody removes it while this object lives
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.identity: dict[str, Any] = manifest["identity"]
        self.bad: int = manifest["bad"]
        self.kept: list[int] = []
        self._lists: list[list[int]] = []
        self._picture: list[tuple[str, int, str]] = []
        self._told: list[list[int]] = []
        self.variants: int = self.identity.get("variants", 1)
        self._prompts_per_shard: int = self.identity["shards"][1]
        self._shards = Shards(folder)
        for name in manifest["pair_shards"]:
            facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            self.kept += facts["kept"]
            self._lists += facts["pairs"]
            self._picture += [
                (name, row, key)
                for key, row in facts.get("rows", [(VALUES, row) for row in range(len(facts["digests"]))])
            ]
            self._told += facts.get("told", [])
        self.pictures = len(self._picture)
        self.lengths = [len(pictures) // self.variants for *pictures, _ in self._lists]
        shapes = [self.shape(index) for index in range(len(self._lists))]
        numbers = {shape: number for number, shape in enumerate(sorted(set(shapes)))}
        self.groups = [numbers[shape] for shape in shapes] if len(numbers) > 1 else None
        self.empty_text = self._shards.row("dropped", 0).to(torch.float32)[None]

    @property
    def alike(self) -> int:
        """How many pairs or rankings have one picture twice: they compare it with itself."""
        return sum(len(set(pictures)) < len(pictures) for *pictures, _ in self._lists)

    def __len__(self) -> int:
        return len(self._lists)

    def batch(self, indices: Sequence[int] | Tensor, variants: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Latents [B,2,C,h,w] float32, winner first, and text [B,L,E] float32 of these pairs, both on the CPU.

        Of rankings [B,K,C,h,w], in the order of their relevance [K]. `variants`: which crop of each, by default the
        first. ValueError unless all B have the same K and one shape.
        """
        sizes = sorted({self.lengths[int(index)] for index in indices})
        if len(sizes) > 1:
            raise ValueError(f"all rankings of a batch must have one K, not {' and '.join(map(str, sizes))}")
        if self.groups is not None and len({self.groups[int(index)] for index in indices}) > 1:
            raise ValueError("all pictures of a batch must have one shape")
        latents = [torch.stack([self._latent(i) for i in pictures]) for pictures in self._pictures(indices, variants)]
        return torch.stack(latents), torch.stack([self._text(self._lists[int(index)][-1]) for index in indices])

    def told(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> Tensor:
        """The sizes [B,K,6] of the pictures of a batch, as SDXL is told them; `frames.told_sizes`.

        Raises ValueError for a cache without them.
        """
        if not self._told:
            raise ValueError("this cache has no sizes of pictures: encode with frames")
        return torch.tensor([[self._told[i] for i in pictures] for pictures in self._pictures(indices, variants)])

    def shape(self, index: int) -> str:
        """Width and height of the pictures of an entry as they were encoded, or "values" if there was no choice."""
        return self._picture[self._lists[index][0]][2]

    def _pictures(self, indices: Sequence[int] | Tensor, variants: Sequence[int] | None) -> Iterator[list[int]]:
        """The numbers of the pictures of each pair or ranking, in one variant."""
        for index, variant in zip(indices, variants or [0] * len(indices), strict=True):
            k = self.lengths[int(index)]
            yield self._lists[int(index)][variant * k : (variant + 1) * k]

    def _latent(self, picture: int) -> Tensor:
        return self._shards.row(*self._picture[picture]).to(torch.float32)

    def _text(self, prompt: int) -> Tensor:
        shard, row = divmod(prompt, self._prompts_per_shard)
        return self._shards.row(f"text-{shard:05d}", row).to(torch.float32)


def build_cache(
    model: Encoders,
    pairs: Sequence[Pair] | Sequence[Ranking],
    folder: str | os.PathLike[str],
    settings: EncodingSettings,
    *,
    max_bad_fraction: float = 0.01,
    known_bad: Sequence[BadRow] = (),
    progress: bool = True,
    ranks: Ranks = ONE_RANK,
    before_encoding: Callable[[Path, int], object] | None = None,
) -> PairCache:
    """Open the cache of these pairs or rankings. If it does not exist, encode them to disk first.

    The VAE's posterior is sampled once for each picture, with noise at the seed address (seed, "vae", the picture's
    number among the readable pictures). The files are the same bits for any number of ranks.

    Args:
        max_bad_fraction: stop once more than this fraction of the rows (pairs and `known_bad`) is bad.
        known_bad: rows that the reader left out (`Counts.bad_rows`), so that they are counted and listed too.
        ranks: the rank of this process and the number of processes. Each process calls this function.
        before_encoding: called on rank 0 with the cache's folder and its size in bytes, if it must be encoded.

    Raises:
        DataError: too many bad rows, no pair left, a damaged shard, or a picture that has changed meanwhile.
        NotFinite: encodings that are not finite.
        NoRoom: the disk has less room than the encodings will take.
    """
    if not pairs:
        raise DataError("there are no pairs to encode")
    identity = _identity(model, pairs, settings)
    home = Path(folder) / digest(json.dumps(identity, sort_keys=True).encode())[:16]
    job = EncodingJob(model, pairs, home, settings, ranks)
    _held = hold(home)  # until this function ends; then the PairCache holds it
    # All ranks find the manifest, or all build the cache: a network disk may show a new file to some ranks first.
    missing = ranks.total(not (home / "manifest.json").is_file())
    if missing:
        if before_encoding is not None and ranks.rank == 0:
            before_encoding(home, job.size())
        ranks.total(0)
        require_room(home, job.size())
    else:
        # max_bad_fraction of this run applies, not that of the run that built the cache.
        bad = [BadRow(row["row"], row["reason"]) for _, row in json_lines(home / "bad_rows.jsonl")]
        require_few_bad(str(home / "bad_rows.jsonl"), bad, len(pairs) + len(known_bad), max_bad_fraction)
    # It replaces dropped captions. It is not in the file "empty", because that of older caches has zeros for SDXL.
    if ranks.rank == 0 and finished_shard(home, "dropped") is None:
        write_shard(home, "dropped", model.encode_text([""]).to(settings.dtype), {})
    if missing:
        _encode(job, identity, known_bad, max_bad_fraction, progress)
    ranks.total(0)
    return PairCache(home)


def _identity(model: Encoders, pairs: Sequence[Pair] | Sequence[Ranking], settings: EncodingSettings) -> dict[str, Any]:
    return {
        "format": CACHE_FORMAT,
        "model": model.fingerprint(),
        "resolution": settings.resolution,
        "data": fingerprint(pairs),
        "seed": settings.seed,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "shards": [settings.pairs_per_shard, settings.prompts_per_shard],
        **({"frames": asdict(settings.frames), "variants": settings.frames.variants} if settings.frames else {}),
        # Left out of the key if it is "no", so that caches built before this setting existed are still found.
        **({} if settings.precision == "no" else {"precision": settings.precision}),
    }


def _encode(
    job: EncodingJob, identity: dict[str, Any], known_bad: Sequence[BadRow], max_bad_fraction: float, progress: bool
) -> None:
    """All passes of `encoding`, and then, on rank 0, the list of bad rows and the manifest."""

    def list_bad(path: Path, bad: list[BadRow]) -> None:
        every = [*known_bad, *bad]
        write_bytes(path, bad_row_lines(every).encode())
        require_few_bad(str(path), every, len(job.lists) + len(known_bad), max_bad_fraction)

    texts = {shard: len(job.texts(shard)) for shard in job.mine(job.text_shards)}
    lists = {shard: len(job.rows(shard)) for shard in job.mine(job.list_shards)}
    with total_bar("encode prompts", len(job.prompts), "prompt", progress) as report:
        encoding.run_pass(job, texts, partial(encoding.encode_prompts, job), report)
    with total_bar(f"read {job.kind}s", len(job.lists), job.kind, progress) as report:
        encoding.run_pass(job, lists, partial(encoding.write_digests, job), report)
    numbers = PictureNumbers.read(job)
    # While encoding, each rank lists the bad rows that it found in its own file; at the end rank 0 lists all.
    rank, listed = job.ranks.rank, job.home / "bad_rows.jsonl"
    own = job.home / f"bad_rows-{rank}.jsonl" if rank else listed
    with total_bar(f"encode {job.kind}s", len(job.lists), job.kind, progress) as report:
        encoding.run_pass(job, lists, encoding.picture_pass(job, numbers, partial(list_bad, own)), report)
    if rank:
        own.unlink(missing_ok=True)
        return
    kept, bad = 0, []
    for good, broken in encoding.list_pictures(job, numbers):
        kept += len(good)
        bad += broken
    list_bad(listed, bad)
    if not kept:
        raise DataError(f"{listed}: no {job.kind} has {'two' if job.kind == 'pair' else 'all its'} good pictures")
    shards = [job.name(shard) for shard in job.list_shards]
    manifest = {"identity": identity, "bad": len(known_bad) + len(bad), "pair_shards": shards}
    write_bytes(job.home / "manifest.json", json.dumps(manifest, indent=1).encode())
    encoding.forget_digests(job)
