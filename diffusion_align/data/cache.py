"""The cache of encodings: each picture and each prompt goes through its encoder once, ever.

    <folder>/<key>/text-00000.safetensors    text [N,L,E] of unique prompts
                   pairs-00000.safetensors   latents [M,C,h,w] of pictures first met in this stretch of pairs
                   pairs-00000.json          their digests, and for each good pair its two pictures and its prompt
                   names-00000.json          while encoding: the digests of all pictures of a stretch
                   bad_rows.jsonl            the rows left out, with reasons
                   manifest.json             what the cache depends on; written last

Rankings are kept alike, in rankings-00000 and so on, with K pictures in place of two. How good a picture is does not
stand here: the same picture files under other labels share a cache.

The key names the model, the resolution, the data and the seed, so a changed input gets another folder and an old
cache is never mistaken for a new one. A shard counts once its JSON is there, which is written after its tensors: an
interrupted build goes on after the last whole shard. Pictures are recognised by their bytes, whatever file or row
they come from.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.data.disk import bytes_of, require_room
from diffusion_align.data.encoding import encode_pictures, encode_texts
from diffusion_align.data.encoding_job import Encoders, Job, Share, together
from diffusion_align.data.encoding_names import Names, forget_names, name_rows, read_names
from diffusion_align.data.layouts import Pair, Ranking
from diffusion_align.data.pairs_and_rankings import check_bad_fraction, fingerprint
from diffusion_align.data.raw_rows import BadRow, DataError, digest, jsonl_rows
from diffusion_align.data.shards import Shards, known_shard, write_bytes, write_shard
from diffusion_align.system.progress import progress_bar

ALONE = Share()
FORMAT = 1


class PairCache:
    """Encoded pairs, or rankings, on disk, read by index.

    Attributes:
        identity: what the encodings depend on (model, resolution, data, seed, precision).
        kept: [len] places of the pairs in the list that the cache was built from; broken pairs are missing.
        lengths: [len] how many pictures each has: 2, or a ranking's K.
        pictures: how many different pictures were encoded.
        bad: how many rows were left out; they are listed in bad_rows.jsonl.
        empty_text: [1,L,E] float32, the encoding of the empty prompt: what a dropped caption becomes. For SDXL too, as
            in the public code of Diffusion-DPO and its relatives; guidance may use zeros.
    """

    def __init__(self, folder: Path):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.identity: dict[str, Any] = manifest["identity"]
        self.bad: int = manifest["bad"]
        self.kept: list[int] = []
        self._lists: list[list[int]] = []
        self._picture: list[tuple[str, int]] = []
        self._prompts_per_shard: int = self.identity["shards"][1]
        self._shards = Shards(folder)
        for name in manifest["pair_shards"]:
            facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            self.kept += facts["kept"]
            self._lists += facts["pairs"]
            self._picture += [(name, row) for row in range(len(facts["digests"]))]
        self.pictures = len(self._picture)
        self.lengths = [len(pictures) for *pictures, _ in self._lists]
        self.empty_text = self._shards.row("dropped", 0).to(torch.float32)[None]

    def __len__(self) -> int:
        return len(self._lists)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Pairs by index -> latents [B,2,C,h,w] float32, winner first, and text [B,L,E] float32, both on the CPU.

        Rankings -> [B,K,C,h,w], in the order of their relevance [K]; ValueError unless all B have one length K.
        """
        sizes = sorted({self.lengths[int(index)] for index in indices})
        if len(sizes) > 1:
            raise ValueError(f"one batch holds lists of one length, not of {' and '.join(map(str, sizes))} pictures")
        rows = [self._lists[int(index)] for index in indices]
        latents = [torch.stack([self._latent(picture) for picture in pictures]) for *pictures, _ in rows]
        return torch.stack(latents), torch.stack([self._text(prompt) for *_, prompt in rows])

    def _latent(self, picture: int) -> Tensor:
        return self._shards.row(*self._picture[picture]).to(torch.float32)

    def _text(self, prompt: int) -> Tensor:
        shard, row = divmod(prompt, self._prompts_per_shard)
        return self._shards.row(f"text-{shard:05d}", row).to(torch.float32)


def build_cache(
    model: Encoders,
    pairs: Sequence[Pair] | Sequence[Ranking],
    folder: str | os.PathLike[str],
    *,
    resolution: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_bad_fraction: float = 0.01,
    known_bad: Sequence[BadRow] = (),
    pairs_per_shard: int = 1024,
    prompts_per_shard: int = 1024,
    progress: bool = True,
    precision: str = "no",
    share: Share = ALONE,
) -> PairCache:
    """Encode pairs, or rankings, to disk, or open what is already there.

    The VAE's posterior is sampled once, with noise addressed by (seed, "vae", the picture's number among those that
    could be read). The same bits come out however many processes share the work.

    Args:
        dtype: precision on disk; batches are float32 in any case.
        precision: what the encoders compute in, as part of the key: "no" is float32. The caller opens the autocast.
        share: with several processes, which this one is; each calls this function.
        max_bad_fraction: stop once more than this part of the rows (pairs and `known_bad`) is broken.
        known_bad: rows that the reader left out (`Counts.bad_rows`), so that they are counted and listed too.

    Raises:
        DataError: too many broken pictures, no pair left, encodings that are not finite, a damaged finished shard, a
            picture that has changed on the way, or less room on the disk than the encodings will take.
    """
    if not pairs:
        raise DataError("there are no pairs to encode")
    identity = {
        "format": FORMAT,
        "model": model.fingerprint(),
        "resolution": resolution,
        "data": fingerprint(pairs),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "shards": [pairs_per_shard, prompts_per_shard],
        **({} if precision == "no" else {"precision": precision}),
    }
    home = Path(folder) / digest(json.dumps(identity, sort_keys=True).encode())[:16]
    # All must find it, or all build: a network disk may show it to some first.
    if not share.meet(not (home / "manifest.json").is_file()):
        # The ceiling is this run's, not that of the run which built the cache.
        bad = [BadRow(row["row"], row["reason"]) for _, row in jsonl_rows(home / "bad_rows.jsonl")]
        check_bad_fraction(str(home / "bad_rows.jsonl"), bad, len(pairs) + len(known_bad), max_bad_fraction)
        _encode_dropped(model, home, share, dtype)
        share.meet(0)
        return PairCache(home)
    home.mkdir(parents=True, exist_ok=True)
    job = Job(model, pairs, home, share, resolution, seed, dtype, (pairs_per_shard, prompts_per_shard))
    require_room(home, bytes_of(pairs, len(job.prompts), model.latent_shape(resolution), model.empty_text, dtype))
    _encode_dropped(model, home, share, dtype)
    rows = len(pairs) + len(known_bad)
    # Each for itself until all is known; the file of another process may be half as long.
    so_far = home / ("bad_rows.jsonl" if share.rank == 0 else f"bad_rows-{share.rank}.jsonl")

    def check(bad: list[BadRow], path: Path = so_far) -> None:
        _list_bad_rows(path, [*known_bad, *bad], rows, max_bad_fraction)

    with _progress("encode prompts", len(job.prompts), "prompt", progress) as reach:
        together(share, *encode_texts(job), reach)
    with _progress(f"read {job.kind}s", len(pairs), job.kind, progress) as reach:
        together(share, *read_names(job), reach)
    names = Names.read(job)
    with _progress(f"encode {job.kind}s", len(pairs), job.kind, progress) as reach:
        together(share, *encode_pictures(job, names, check), reach)
    if share.rank == 0:
        kept, bad = 0, list(known_bad)
        for good, broken in name_rows(job, names):
            kept += len(good)
            bad += broken
        _list_bad_rows(home / "bad_rows.jsonl", bad, rows, max_bad_fraction)
        if not kept:
            good = "two" if job.kind == "pair" else "all its"
            raise DataError(f"{home / 'bad_rows.jsonl'}: no {job.kind} has {good} good pictures")
        manifest = {"identity": identity, "bad": len(bad), "pair_shards": [job.name(i) for i in job.list_shards]}
        write_bytes(home / "manifest.json", json.dumps(manifest, indent=1).encode())
        forget_names(job)
    else:
        so_far.unlink(missing_ok=True)
    share.meet(0)
    return PairCache(home)


def _encode_dropped(model: Encoders, home: Path, share: Share, dtype: torch.dtype) -> None:
    """What a dropped caption becomes. It has a name of its own: older caches have SDXL's zeros in their "empty"."""
    if share.rank == 0 and known_shard(home, "dropped") is None:
        write_shard(home, "dropped", model.encode_text([""]).to(dtype), {})


@contextmanager
def _progress(what: str, total: int, unit: str, show: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr as a function of how many are done, by all processes."""
    if not show:
        # Not even a disabled bar: tqdm's lock is shared with forked processes, and one killed with it blocks all.
        yield lambda done: None
        return
    with progress_bar(total=total, desc=what, unit=unit) as bar:
        yield lambda done: bar.update(done - bar.n)


def _list_bad_rows(path: Path, bad: Sequence[BadRow], rows: int, max_bad_fraction: float) -> None:
    lines = [json.dumps({"row": row.row, "reason": row.reason}) + "\n" for row in bad]
    write_bytes(path, "".join(lines).encode())
    check_bad_fraction(str(path), bad, rows, max_bad_fraction)
