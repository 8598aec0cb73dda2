"""What a training would read, read without one: every row, every prompt, and every picture decoded whole."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from diffusion_align.data.images import ImageError, decode_image
from diffusion_align.data.layouts import Picture, read_bytes
from diffusion_align.data.raw_rows import BadRow, DataError, digest
from diffusion_align.data.read import Source, rows
from diffusion_align.data.rows import Row

# Rows whose bytes are in memory together.
_CHUNK = 16
# Verdicts that are remembered, for sets whose rows share pictures; forgotten all at once when they are too many.
_REMEMBERED = 100_000


def checked(source: Source) -> Iterator[tuple[Row | BadRow, bool]]:
    """Every row in order, as it is or as the BadRow that a training would leave out, and whether two pictures of it are
    the same bytes. Memory does not grow with the set; DataError as `recognise.rows`."""
    known: dict[Picture, tuple[str, str]] = {}
    found = rows(source)
    with ThreadPoolExecutor(4) as pool:
        while chunk := list(islice(found, _CHUNK)):
            if len(known) > _REMEMBERED:
                known.clear()
            pictures = {p for row in chunk if isinstance(row, Row) for p in row.pictures if p not in known}
            # Read in order and in one thread, as a parquet file's row group is held once; decoded in several.
            ordered = [p for row in chunk if isinstance(row, Row) for p in row.pictures if p in pictures]
            ordered = list(dict.fromkeys(ordered))
            data = [_read(picture) for picture in ordered]
            known |= dict(zip(ordered, pool.map(_verdict, data), strict=True))
            for row in chunk:
                yield (row, False) if isinstance(row, BadRow) else _judge(row, [known[p] for p in row.pictures])


def _judge(row: Row, verdicts: list[tuple[str, str]]) -> tuple[Row | BadRow, bool]:
    reasons = [f"picture {place} {why}" for place, (_, why) in enumerate(verdicts) if why]
    if reasons:
        return BadRow(row.id, "; ".join(reasons)), False
    return row, len({name for name, _ in verdicts}) < len(verdicts)


def _read(picture: Picture) -> bytes | str:
    try:
        return read_bytes(picture)
    except (DataError, OSError) as error:
        return f"cannot be read ({error})"


def _verdict(data: bytes | str) -> tuple[str, str]:
    """The digest of a picture's bytes, and why it cannot be used, or nothing."""
    if isinstance(data, str):
        return "", data
    try:
        decode_image(data)
    except ImageError as error:
        return digest(data), str(error)
    return digest(data), ""
