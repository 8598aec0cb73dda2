"""The cache of encodings: each picture and each prompt is encoded once.

    <folder>/<key>/text-00000.safetensors    text [N,L,E] of unique prompts
                   pairs-00000.safetensors   latents [M,C,h,w] of pictures first met in this stretch of pairs
                   pairs-00000.json          their digests, and for each good pair its two pictures and its prompt
                   names-00000.json          while encoding: the digests of all pictures of a stretch
                   bad_rows.jsonl            the rows left out, with reasons
                   manifest.json             what the cache depends on; written last

Rankings have files rankings-00000 and so on, with K pictures in place of two. How good a picture is is not kept: the
same picture files under other labels have the same cache.

The key is a digest of the model, the resolution, the data and the seed, so a changed input gets another folder. A shard
is finished once its JSON exists, which is written after its tensors: an interrupted build goes on after the last
finished shard. Pictures are recognised by their bytes, whatever their file or row.
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
        kept: [len] places of the pairs in the list that the cache was built from; broken pairs are missing.
        lengths: [len] how many pictures each has: 2, or a ranking's K.
        groups: [len] numbers of the shapes of the latents; None if all have one shape.
        variants: how many crops of each picture are encoded.
        pictures: how many different pictures were encoded.
        bad: how many rows were left out; they are listed in bad_rows.jsonl.
        empty_text: [1,L,E] float32, the encoding of the empty prompt: what a dropped caption becomes. For SDXL too, as
            in the public code of Diffusion-DPO and its relatives; guidance may use zeros.
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
        """Pairs by index -> latents [B,2,C,h,w] float32, winner first, and text [B,L,E] float32, both on the CPU.

        Rankings -> [B,K,C,h,w], in the order of their relevance [K]. `variants`: which crop of each, by default the
        first. ValueError unless all B have one length K and one shape.
        """
        sizes = sorted({self.lengths[int(index)] for index in indices})
        if len(sizes) > 1:
            raise ValueError(f"one batch holds lists of one length, not of {' and '.join(map(str, sizes))} pictures")
        if self.groups is not None and len({self.groups[int(index)] for index in indices}) > 1:
            raise ValueError("one batch holds pictures of one shape")
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
        """Width and height of the pictures of a list as they were encoded, or "values" if there was no choice."""
        return self._picture[self._lists[index][0]][2]

    def _pictures(self, indices: Sequence[int] | Tensor, variants: Sequence[int] | None) -> Iterator[list[int]]:
        """The numbers of the pictures of each list, in one variant."""
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
    """Encode pairs, or rankings, to disk, or open what is already there.

    The VAE's posterior is sampled once, with noise addressed by (seed, "vae", the picture's number among those that
    could be read). The files are the same bits for any number of ranks.

    Args:
        max_bad_fraction: stop once more than this fraction of the rows (pairs and `known_bad`) is broken.
        known_bad: rows that the reader left out (`Counts.bad_rows`), so that they are counted and listed too.
        ranks: with several processes, which this one is; each calls this function.
        before_encoding: called on rank 0 with the cache's folder and its size in bytes, if it must be encoded.

    Raises:
        DataError: too many broken pictures, no pair left, a damaged shard, or a picture that has changed meanwhile.
        NotFinite: encodings that are not finite.
        NoRoom: the disk has less room than the encodings will take.
    """
    if not pairs:
        raise DataError("there are no pairs to encode")
    identity = _identity(model, pairs, settings)
    home = Path(folder) / digest(json.dumps(identity, sort_keys=True).encode())[:16]
    job = EncodingJob(model, pairs, home, settings, ranks)
    # All ranks must find it, or all build it: a network disk may show it to some first.
    _held = hold(home)  # until this function ends; then the PairCache holds it
    missing = ranks.total(not (home / "manifest.json").is_file())
    if missing:
        if before_encoding is not None and ranks.rank == 0:
            before_encoding(home, job.size())
        ranks.total(0)
        require_room(home, job.size())
    else:
        # The ceiling is that of this run, not of the run that built the cache.
        bad = [BadRow(row["row"], row["reason"]) for _, row in json_lines(home / "bad_rows.jsonl")]
        require_few_bad(str(home / "bad_rows.jsonl"), bad, len(pairs) + len(known_bad), max_bad_fraction)
    # What a dropped caption becomes. It has a file of its own: older caches have SDXL's zeros in their "empty".
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
        # Not in every key: caches that were built before there was such a setting must be found.
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
    # Until the end each rank lists the bad rows that it knows of.
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
