"""The pictures of all pairs or rankings, numbered in the order in which they first occur."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.data.bad_rows import BadRow
from diffusion_align.data.pairs_and_rankings import Pair
from diffusion_align.data.rows.raw_rows import StoredPicture
from diffusion_align.data.shards import EncodingJob

UNREAD = "cannot be read"  # no digest begins with it


def digests_path(job: EncodingJob, shard: int) -> Path:
    """The file of the names of a shard's pictures, while encoding."""
    return job.home / f"names-{shard:05d}.json"


@dataclass(frozen=True)
class PictureNumbers:
    """The pictures of all pairs or rankings, numbered in the order in which they first occur.

    Attributes:
        of: [rows][K], the number of each picture, or the reason why it cannot be read.
        before: [rows], how many pictures occur before a row.
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
            for row in json.loads(digests_path(job, shard).read_text(encoding="utf-8")):
                before.append(len(number))
                of.append([d if d.startswith(UNREAD) else number.setdefault(d, len(number)) for d in row])
        return cls(of, before, list(number))

    def first_met(self, job: EncodingJob, rows: range) -> dict[int, StoredPicture]:
        """The pictures that occur in these rows and not before, in order."""
        new: dict[int, StoredPicture] = {}
        for i in rows:
            for number, picture in zip(self.of[i], job.lists[i].pictures * job.variants, strict=True):
                if isinstance(number, int) and number >= self.before[rows.start]:
                    new.setdefault(number, picture)
        return new

    def bad_row(self, job: EncodingJob, i: int, broken: Mapping[str, str]) -> BadRow | None:
        """What is wrong with a row. `broken`: digests of pictures that cannot be used, and the reasons."""
        entry = job.lists[i]
        once = self.of[i][: len(entry.pictures)]  # a picture is broken in every frame
        why = [number if isinstance(number, str) else broken.get(self.digests[number]) for number in once]
        sides = ("winner", "loser") if isinstance(entry, Pair) else [f"picture {k}" for k in range(len(why))]
        reasons = [
            f"{side} ({picture}) {reason}" if isinstance(picture, Path) else f"{side} {reason}"
            for side, picture, reason in zip(sides, entry.pictures, why, strict=True)
            if reason is not None
        ]
        return BadRow(entry.id, "; ".join(reasons)) if reasons else None
