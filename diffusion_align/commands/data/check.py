"""`data check`: reads what a training would read, every picture whole, and lists what it would leave out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from diffusion_align.commands.data.captions import describe_cut
from diffusion_align.commands.data.summary import summarise
from diffusion_align.data.check import checked
from diffusion_align.data.pairs_and_rankings import check_bad_fraction
from diffusion_align.data.raw_rows import BadRow, DataError
from diffusion_align.data.read import recognise
from diffusion_align.data.rows import is_tie
from diffusion_align.options.data import DataCheck
from diffusion_align.system.progress import progress_bar

# Captions that are counted together.
_CHUNK = 1024


def data_check(options: DataCheck) -> int:
    """Check every row and write the broken ones down.

    Raises:
        DataError: nothing known or nothing there, or more broken rows than are allowed; the list is written first.
    """
    o = options
    assert o.path is not None  # the options' own check says so
    source = recognise(Path(o.path).expanduser(), o.split)
    total = summarise(source).rows
    if not total:
        raise DataError(f"{source.path}: holds no rows; is this the right file?")
    compares = source.format.holds in ("pairs", "rankings")
    count_cut = _cut_counter(o.pretrained_model_name_or_path) if o.pretrained_model_name_or_path else None
    captions: list[str] = []
    cut = 0
    target = Path(o.bad_rows)
    staged = target.with_name(f".tmp-{target.name}")
    bad: list[BadRow] = []
    good = ties = alike = 0
    with staged.open("w", encoding="utf-8") as lines, progress_bar(total=total, desc="check", unit="row") as bar:
        for row, same in checked(source):
            bar.update()
            if isinstance(row, BadRow):
                # Of all of them only the first is kept: the others are on the disk.
                bad.append(row if not bad else bad[0])
                lines.write(json.dumps({"row": row.row, "reason": row.reason}) + "\n")
            else:
                tied = compares and is_tie(row)
                ties, good = ties + tied, good + (not tied)
                alike += same and not tied
                captions.append(row.prompt)
            if count_cut is not None and len(captions) == _CHUNK:
                cut += count_cut(captions)[0]
            if len(captions) == _CHUNK:
                captions = []
    os.replace(staged, target)
    print(f"{total} rows: {good} good, {ties} ties, {len(bad)} broken, listed in {target}")
    if alike:
        print(f"{alike} of the good rows compare a picture with itself, which teaches nothing")
    if count_cut is not None:
        more, limit = count_cut(captions)
        print(describe_cut(cut + more, good + ties, limit))
    check_bad_fraction(str(target), bad, total, o.max_bad_fraction)
    return 0


def _cut_counter(model: str) -> Callable[[list[str]], tuple[int, int]]:
    """captions -> how many of them this model's text encoder cuts, and after how many tokens. Loads only tokenizers."""
    from diffusion_align.models.captions import cut_captions, tokenizers_in
    from diffusion_align.models.hub import asset

    return partial(cut_captions, tokenizers_in(asset("tiny") if model == "tiny" else Path(model).expanduser()))
