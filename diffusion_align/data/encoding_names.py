"""Which picture is which: the passes before and after encoding, over digests alone.

The first reads every picture's bytes and writes down their digests. From these each process knows by itself which shard
is the first to meet a picture, and with which number. The last, on one process, names the pictures of each row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.data.encoding_job import CHUNK, Job
from diffusion_align.data.layouts import Pair, Picture, Ranking, read_bytes
from diffusion_align.data.raw_rows import BadRow, DataError, digest
from diffusion_align.data.shards import write_bytes

_UNREAD = "cannot be read"  # which no digest begins with


def read_names(job: Job) -> tuple[int, Iterator[int]]:
    """How many lists are this process's, and the work of writing down their pictures' digests."""
    mine = job.share.of(job.list_shards)
    count = sum(len(job.rows(shard)) for shard in mine)

    def work() -> Iterator[int]:
        left = count
        for shard in mine:
            path, rows = _names_path(job, shard), job.rows(shard)
            if not path.is_file():
                names = []
                for i in rows:
                    data = [read_picture(picture) for picture in job.lists[i].pictures]
                    names.append([digest(d) if isinstance(d, bytes) else d for d in data])
                    if len(names) % CHUNK == 0 and len(names) < len(rows):
                        yield left - len(names)
                write_bytes(path, json.dumps(names).encode())
            left -= len(rows)
            yield left

    return count, work()


def _names_path(job: Job, shard: int) -> Path:
    return job.home / f"names-{shard:05d}.json"


@dataclass(frozen=True)
class Names:
    """The pictures of all lists, numbered in the order in which they are first met: `of` [lists][K], or the reason why
    one was not read; `before` [lists], how many are met before a list; `digests` by number."""

    of: list[list[int | str]]
    before: list[int]
    digests: list[str]

    @classmethod
    def read(cls, job: Job) -> Names:
        """All that the first pass wrote down, on every process."""
        number: dict[str, int] = {}
        of: list[list[int | str]] = []
        before = []
        for shard in job.list_shards:
            for row in json.loads(_names_path(job, shard).read_text(encoding="utf-8")):
                before.append(len(number))
                of.append([n if n.startswith(_UNREAD) else number.setdefault(n, len(number)) for n in row])
        return cls(of, before, list(number))

    def met_first(self, job: Job, rows: range) -> dict[int, Picture]:
        """The pictures that are met in these rows and not before, in order."""
        new: dict[int, Picture] = {}
        for i in rows:
            for number, picture in zip(self.of[i], job.lists[i].pictures, strict=True):
                if isinstance(number, int) and number >= self.before[rows.start]:
                    new.setdefault(number, picture)
        return new

    def bad_row(self, job: Job, i: int, broken: Mapping[str, str]) -> BadRow | None:
        """What is wrong with a row, by the pictures that are known to be broken."""
        entry = job.lists[i]
        why = [number if isinstance(number, str) else broken.get(self.digests[number]) for number in self.of[i]]
        reasons = [
            f"{_name(side, picture)} {reason}"
            for side, picture, reason in zip(_sides(entry), entry.pictures, why, strict=True)
            if reason is not None
        ]
        return BadRow(entry.id, "; ".join(reasons)) if reasons else None


def name_rows(job: Job, names: Names) -> Iterator[tuple[list[int], list[BadRow]]]:
    """Write into each shard's facts which pictures its rows are of; yields its good rows and the bad ones."""
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
            row = names.bad_row(job, i, broken)
            if row is None:
                found = [index[names.digests[int(number)]] for number in names.of[i]]
                facts["kept"].append(i)
                facts["pairs"].append([*found, place[job.lists[i].prompt]])
            else:
                facts["bad"].append([row.row, row.reason])
                bad.append(row)
        write_bytes(path, json.dumps(facts).encode())
        yield facts["kept"], bad


def forget_names(job: Job) -> None:
    """Remove what the first pass wrote down, once all is there."""
    for shard in job.list_shards:
        _names_path(job, shard).unlink(missing_ok=True)


def _sides(entry: Pair | Ranking) -> Sequence[str]:
    """What the pictures of a row are called."""
    return ("winner", "loser") if isinstance(entry, Pair) else [f"picture {i}" for i in range(len(entry.pictures))]


def _name(side: str, picture: Picture) -> str:
    """Which picture of a row: its side, and its file where it has one of its own."""
    return f"{side} ({picture})" if isinstance(picture, Path) else side


def read_picture(picture: Picture) -> bytes | str:
    """The bytes of a picture, or the reason why there are none, in words that no digest can equal."""
    try:
        return read_bytes(picture)
    except (DataError, OSError) as error:
        return f"{_UNREAD} ({error})"
