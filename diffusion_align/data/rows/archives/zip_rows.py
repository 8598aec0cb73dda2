"""Samples of zip archives: pictures with texts of their names."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from diffusion_align.data.bad_rows import BadRow
from diffusion_align.data.rows.archives.samples import Sample, sample_rows, samples
from diffusion_align.data.rows.archives.zip_members import zip_members
from diffusion_align.data.rows.known_layouts import Layout
from diffusion_align.data.rows.raw_rows import RawRow


def zip_samples(file: Path, unread: Counter[str]) -> Iterator[BadRow | tuple[str, Sample]]:
    """The samples of an archive; see `samples`."""
    members = zip_members(file, unread)
    return samples(file, (one if isinstance(one, BadRow) else (one.path, one) for one in members))


def zip_rows(file: Path, layout: Layout, unread: Counter[str], encoding: str) -> Iterator[BadRow | RawRow]:
    """The samples of an archive as rows of Pick-a-Pic, or of pictures with captions."""
    yield from sample_rows(file, zip_samples(file, unread), layout, encoding)
