"""`data check`: reads what a training would read, every picture whole, and lists what it would leave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from diffusion_align.commands.data.fetch import read_options
from diffusion_align.commands.data.long_captions import describe_long_captions
from diffusion_align.commands.data.summary import summarise_data
from diffusion_align.data.bad_rows import BadRow, DataError, bad_row_lines, require_few_bad
from diffusion_align.data.disk import digest, replacing
from diffusion_align.data.images import ImageError, decode_image
from diffusion_align.data.pairs_and_rankings import DataRow, is_tie
from diffusion_align.data.read import read_rows
from diffusion_align.data.rows.raw_rows import StoredPicture, picture_name, read_bytes
from diffusion_align.data.rows.recognise import DataSource, recognise
from diffusion_align.options.data import DataCheck
from diffusion_align.system.progress import progress_bar

_CAPTIONS_AT_A_TIME = 1024
# Rows whose bytes are in memory together.
_CHUNK = 16
# Pictures whose faults are remembered, for sets whose rows have pictures in common; all are forgotten at once.
_REMEMBERED = 100_000


def data_check(options: DataCheck) -> int:
    """Check every row and list the bad ones.

    Raises:
        DataError: nothing known or nothing there, or more bad rows than are allowed; the list is written first.
    """
    o = options
    assert o.path is not None  # the options' own check requires it
    source = recognise(Path(o.path).expanduser(), o.split, options=read_options(o))
    total = summarise_data(source).rows
    if not total:
        raise DataError(f"{source.path}: holds no rows; is this the right file?")
    count_cut = _cut_counter(o.pretrained_model_name_or_path) if o.pretrained_model_name_or_path else None
    captions: list[str] = []
    target = Path(o.bad_rows)
    bad: list[BadRow] = []
    cut = good = ties = alike = 0
    with (
        replacing(target) as staged,
        staged.open("w", encoding="utf-8") as lines,
        progress_bar(total=total, desc="check", unit="row") as bar,
    ):
        for row, same in checked_rows(source):
            bar.update()
            if isinstance(row, BadRow):
                # Only the first is kept in memory: all are in the file.
                bad.append(row if not bad else bad[0])
                lines.write(bad_row_lines([row]))
                continue
            tied = source.layout.compares and is_tie(row)
            ties, good = ties + tied, good + (not tied)
            alike += same and not tied
            if count_cut is not None:
                captions.append(row.prompt)
                if len(captions) == _CAPTIONS_AT_A_TIME:
                    cut, captions = cut + count_cut(captions)[0], []
    print(f"{total} rows: {good} good, {ties} ties, {len(bad)} bad, listed in {target}")
    if alike:
        print(f"{alike} of the good rows compare a picture with itself, which teaches nothing")
    if count_cut is not None:
        more, limit = count_cut(captions)
        print(describe_long_captions(cut + more, good + ties, limit))
    require_few_bad(str(target), bad, total, o.max_bad_fraction)
    return 0


def _cut_counter(model: str) -> Callable[[list[str]], tuple[int, int]]:
    """captions -> how many of them this model's text encoder cuts, and after how many tokens. Loads only tokenizers."""
    from diffusion_align.models.hub import asset
    from diffusion_align.models.prompts.token_limit import cut_captions, tokenizers_in

    return partial(cut_captions, tokenizers_in(asset("tiny") if model == "tiny" else Path(model).expanduser()))


def checked_rows(source: DataSource) -> Iterator[tuple[DataRow | BadRow, bool]]:
    """Every row in order, as it is or as the BadRow that a training would leave out, and whether two pictures of it are
    the same bytes. Memory does not grow with the set; DataError as `read_rows`."""
    known: dict[StoredPicture, tuple[str, str]] = {}
    found = read_rows(source)
    with ThreadPoolExecutor(4) as pool:
        while chunk := list(islice(found, _CHUNK)):
            if len(known) > _REMEMBERED:
                known.clear()
            # Read in order and in one thread, as a parquet file's row group is held once; decoded in several.
            new = [p for row in chunk if isinstance(row, DataRow) for p in row.pictures if p not in known]
            new = list(dict.fromkeys(new))
            data = [_read(picture) for picture in new]
            known |= dict(zip(new, pool.map(_fault, data), strict=True))
            for row in chunk:
                yield (row, False) if isinstance(row, BadRow) else _judge(row, [known[p] for p in row.pictures])


def _judge(row: DataRow, faults: list[tuple[str, str]]) -> tuple[DataRow | BadRow, bool]:
    named = zip(map(picture_name, row.pictures), faults, strict=True)
    reasons = [f"picture {name or place} {why}" for place, (name, (_, why)) in enumerate(named) if why]
    if reasons:
        return BadRow(row.id, "; ".join(reasons)), False
    return row, len({name for name, _ in faults}) < len(faults)


def _read(picture: StoredPicture) -> bytes | str:
    try:
        return read_bytes(picture)
    except (DataError, OSError) as error:
        return f"cannot be read ({error})"


def _fault(data: bytes | str) -> tuple[str, str]:
    """The digest of a picture's bytes, and why it cannot be used, or nothing."""
    if isinstance(data, str):
        return "", data
    try:
        decode_image(data)
    except ImageError as error:
        return digest(data), str(error)
    return digest(data), ""
