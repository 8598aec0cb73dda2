"""`data check`: reads what a training would read, every picture whole, and lists what it would leave out."""

from __future__ import annotations

import json
import os
from pathlib import Path

from diffusion_align.data.check import checked
from diffusion_align.data.pairs import check_bad_fraction
from diffusion_align.data.readers import BadRow, DataError
from diffusion_align.data.recognise import recognise
from diffusion_align.data.rows import is_tie
from diffusion_align.data.summary import summarise
from diffusion_align.options.data import DataCheck
from diffusion_align.progress import progress_bar


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
    os.replace(staged, target)
    print(f"{total} rows: {good} good, {ties} ties, {len(bad)} broken, listed in {target}")
    if alike:
        print(f"{alike} of the good rows compare a picture with itself, which teaches nothing")
    check_bad_fraction(str(target), bad, total, o.max_bad_fraction)
    return 0
