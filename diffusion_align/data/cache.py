"""The cache of encodings: each picture and each prompt goes through its encoder once, ever.

    <folder>/<key>/text-00000.safetensors    text [N,L,E] of unique prompts
                   pairs-00000.safetensors   latents [M,C,h,w] of pictures first met in this stretch of pairs
                   pairs-00000.json          their digests, and for each good pair its two pictures and its prompt
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_align import rng
from diffusion_align.data.images import ImageError, load_picture
from diffusion_align.data.layouts import Pair, Picture, Ranking, read_bytes
from diffusion_align.data.pairs import check_bad_fraction, fingerprint
from diffusion_align.data.readers import BadRow, DataError, digest, jsonl_rows
from diffusion_align.data.room import bytes_of, require_room
from diffusion_align.data.shards import Shards, make_shard, write_bytes

FORMAT = 1
# Lists whose bytes are in memory together; the largest batch for the VAE is K times that.
_CHUNK = 16


class Encoders(Protocol):
    """The part of the gate that a cache needs (models.TextToImage has it)."""

    @property
    def empty_text(self) -> Tensor: ...
    def fingerprint(self) -> str: ...
    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]: ...
    def encode_text(self, prompts: list[str]) -> Tensor: ...
    def encode_images(self, images: Tensor, noise: Tensor | None) -> Tensor: ...


class PairCache:
    """Encoded pairs, or rankings, on disk, read by index.

    Attributes:
        identity: what the encodings depend on (model, resolution, data, seed, precision).
        kept: [len] places of the pairs in the list that the cache was built from; broken pairs are missing.
        lengths: [len] how many pictures each has: 2, or a ranking's K.
        pictures: how many different pictures were encoded.
        bad: how many rows were left out; they are listed in bad_rows.jsonl.
        empty_text: [1,L,E] float32, the encoding of the empty prompt.
    """

    def __init__(self, folder: Path):
        manifest = json.loads((folder / "manifest.json").read_text())
        self.folder = folder
        self.identity: dict[str, Any] = manifest["identity"]
        self.bad: int = manifest["bad"]
        self.kept: list[int] = []
        self._lists: list[list[int]] = []
        self._picture: list[tuple[str, int]] = []
        self._prompts_per_shard: int = self.identity["shards"][1]
        self._shards = Shards(folder)
        for name in manifest["pair_shards"]:
            facts = json.loads((folder / f"{name}.json").read_text())
            self.kept += facts["kept"]
            self._lists += facts["pairs"]
            self._picture += [(name, row) for row in range(len(facts["digests"]))]
        self.pictures = len(self._picture)
        self.lengths = [len(pictures) for *pictures, _ in self._lists]
        self.empty_text = self._shards.row("empty", 0).to(torch.float32)[None]

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
    gate: Encoders,
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
) -> PairCache:
    """Encode pairs, or rankings, to disk, or open what is already there.

    The VAE's posterior is sampled once, with noise addressed by (seed, "vae", picture index). With several processes,
    run it on one while the others wait; then the same call opens the finished cache everywhere.

    Args:
        dtype: precision on disk; batches are float32 in any case.
        max_bad_fraction: stop once more than this part of the rows (pairs and `known_bad`) is broken.
        known_bad: rows that the reader left out (`Counts.bad_rows`), so that they are counted and listed too.

    Raises:
        DataError: too many broken pictures, no pair left, encodings that are not finite, a damaged finished shard, or
            less room on the disk than the encodings will take.
    """
    if not pairs:
        raise DataError("there are no pairs to encode")
    kind = "ranking" if isinstance(pairs[0], Ranking) else "pair"
    identity = {
        "format": FORMAT,
        "model": gate.fingerprint(),
        "resolution": resolution,
        "data": fingerprint(pairs),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "shards": [pairs_per_shard, prompts_per_shard],
    }
    home = Path(folder) / digest(json.dumps(identity, sort_keys=True).encode())[:16]
    if (home / "manifest.json").is_file():
        # The ceiling is this run's, not that of the run which built the cache.
        bad = [BadRow(row["row"], row["reason"]) for _, row in jsonl_rows(home / "bad_rows.jsonl")]
        check_bad_fraction(str(home / "bad_rows.jsonl"), bad, len(pairs) + len(known_bad), max_bad_fraction)
        return PairCache(home)
    home.mkdir(parents=True, exist_ok=True)

    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    require_room(home, bytes_of(pairs, len(prompts), gate.latent_shape(resolution), gate.empty_text, dtype))
    make_shard(home, "empty", lambda: (gate.empty_text.to(dtype), {}))
    with _progress(len(prompts), "prompt", progress) as reach:
        for shard, first in enumerate(range(0, len(prompts), prompts_per_shard)):
            part = prompts[first : first + prompts_per_shard]
            make_shard(home, f"text-{shard:05d}", partial(_encode_prompts, gate, part, dtype))
            reach(first + len(part))

    names: list[str] = []
    bad = list(known_bad)
    kept = 0
    seen: dict[str, int | str] = {}  # picture digest -> its index, or why it is broken
    pictures = 0
    prompt_index = {prompt: index for index, prompt in enumerate(prompts)}
    encode = partial(_encode_pairs, gate, seen=seen, prompt_index=prompt_index, resolution=resolution, seed=seed)
    with _progress(len(pairs), kind, progress) as reach:
        for first in range(0, len(pairs), pairs_per_shard):
            part = range(first, min(first + pairs_per_shard, len(pairs)))
            names.append(f"{kind}s-{first // pairs_per_shard:05d}")

            def make(part: range = part, pictures: int = pictures) -> tuple[Tensor, dict[str, Any]]:
                latents, facts = encode(pairs, part, first_picture=pictures, reach=reach)
                return latents.to(dtype), facts

            facts = make_shard(home, names[-1], make)
            reach(part.stop)
            seen |= {name: pictures + row for row, name in enumerate(facts["digests"])} | facts["broken"]
            pictures += len(facts["digests"])
            kept += len(facts["kept"])
            bad += [BadRow(row, reason) for row, reason in facts["bad"]]
            _list_bad_rows(home / "bad_rows.jsonl", bad, len(pairs) + len(known_bad), max_bad_fraction)
    if not kept:
        raise DataError(
            f"{home / 'bad_rows.jsonl'}: no {kind} has {'two' if kind == 'pair' else 'all its'} good pictures"
        )
    manifest = {"identity": identity, "bad": len(bad), "pair_shards": names}
    write_bytes(home / "manifest.json", json.dumps(manifest, indent=1).encode())
    return PairCache(home)


@contextmanager
def _progress(total: int, unit: str, show: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr as a function of how many are done."""
    if not show:
        # Not even a disabled bar: tqdm's lock is shared with forked processes, and one killed with it blocks all.
        yield lambda done: None
        return
    with tqdm(total=total, desc=f"encode {unit}s", unit=unit) as bar:
        yield lambda done: bar.update(done - bar.n)


def _list_bad_rows(path: Path, bad: Sequence[BadRow], rows: int, max_bad_fraction: float) -> None:
    lines = [json.dumps({"row": row.row, "reason": row.reason}) + "\n" for row in bad]
    write_bytes(path, "".join(lines).encode())
    check_bad_fraction(str(path), bad, rows, max_bad_fraction)


def _encode_prompts(gate: Encoders, prompts: list[str], dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    return gate.encode_text(prompts).to(dtype), {}


def _encode_pairs(
    gate: Encoders,
    pairs: Sequence[Pair] | Sequence[Ranking],
    part: range,
    *,
    seen: dict[str, int | str],
    prompt_index: dict[str, int],
    resolution: int,
    seed: int,
    first_picture: int,
    reach: Callable[[int], object],
) -> tuple[Tensor, dict[str, Any]]:
    """Encode the pictures of pairs[part] that were not seen before -> latents [M,C,h,w] and the shard's facts."""
    shape = gate.latent_shape(resolution)
    latents = [torch.empty(0, *shape)]
    known = dict(seen)
    facts: dict[str, Any] = {"digests": [], "broken": {}, "pairs": [], "kept": [], "bad": []}
    with ThreadPoolExecutor(4) as pool:
        for start in range(part.start, part.stop, _CHUNK):
            chunk = range(start, min(start + _CHUNK, part.stop))
            data = {i: [_read(picture) for picture in pairs[i].pictures] for i in chunk}
            names = {i: [digest(d) if isinstance(d, bytes) else d for d in row] for i, row in data.items()}
            new = {
                name: d
                for i in chunk
                for name, d in zip(names[i], data[i], strict=True)
                if isinstance(d, bytes) and name not in known
            }
            good = []
            for name, picture in zip(new, pool.map(partial(_decode, resolution=resolution), new.values()), strict=True):
                if isinstance(picture, str):
                    known[name] = facts["broken"][name] = picture
                else:
                    known[name] = first_picture + len(facts["digests"])
                    facts["digests"].append(name)
                    good.append(picture)
            if good:
                last = first_picture + len(facts["digests"])
                noise = rng.normal_batch(shape, seed, "vae", range(last - len(good), last))
                latents.append(gate.encode_images(torch.stack(good), noise).cpu())
            for i in chunk:
                found = [known.get(name, name) for name in names[i]]  # an unread picture's name is its reason
                if all(isinstance(index, int) for index in found):
                    facts["kept"].append(i)
                    facts["pairs"].append([*found, prompt_index[pairs[i].prompt]])
                else:
                    sides = zip(_sides(pairs[i]), pairs[i].pictures, found, strict=True)
                    reasons = [f"{_name(side, picture)} {why}" for side, picture, why in sides if isinstance(why, str)]
                    facts["bad"].append([pairs[i].id, "; ".join(reasons)])
            reach(chunk.stop)
    return torch.cat(latents), facts


def _sides(entry: Pair | Ranking) -> Sequence[str]:
    """What the pictures of a row are called."""
    return ("winner", "loser") if isinstance(entry, Pair) else [f"picture {i}" for i in range(len(entry.pictures))]


def _name(side: str, picture: Picture) -> str:
    """Which picture of a row: its side, and its file where it has one of its own."""
    return f"{side} ({picture})" if isinstance(picture, Path) else side


def _read(picture: Picture) -> bytes | str:
    """The bytes of a picture, or the reason why there are none, in words that no digest can equal."""
    try:
        return read_bytes(picture)
    except (DataError, OSError) as error:
        return f"cannot be read ({error})"


def _decode(data: bytes, resolution: int) -> Tensor | str:
    try:
        return load_picture(data, resolution)
    except ImageError as error:
        return str(error)
