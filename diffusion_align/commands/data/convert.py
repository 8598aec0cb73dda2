"""`data convert`: any set that compares pictures, as shards of parquet that hold the pictures themselves."""

from __future__ import annotations

from pathlib import Path

from diffusion_align.commands.data.summary import summarise
from diffusion_align.commands.pasted import pasted
from diffusion_align.data.convert import convert
from diffusion_align.data.pairs_and_rankings import comparing
from diffusion_align.data.raw_rows import DataError
from diffusion_align.data.read import LAYOUTS
from diffusion_align.options.data import DataConvert
from diffusion_align.system.progress import progress_bar


def data_convert(options: DataConvert) -> int:
    """Convert, or go on where a conversion was stopped.

    Raises:
        DataError: see `convert`; and for a set without preferences.
    """
    o = options
    assert o.path is not None and o.out is not None  # the options' own check says so
    source, out = comparing(Path(o.path).expanduser(), o.split, LAYOUTS), Path(o.out)
    found = summarise(source)
    if not found.used:
        raise DataError(
            f"{source.path}: {found.rows} rows, {found.ties} ties, {found.broken} broken: nothing to convert"
        )
    try:
        with progress_bar(total=found.rows, desc="convert", unit="row") as bar:
            counts = convert(
                source,
                out,
                to=o.to,
                total=found.rows,
                max_bad_fraction=o.max_bad_fraction,
                rows_per_shard=o.rows_per_shard,
                reach=lambda done: bar.update(done - bar.n),
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished stays in {out}; the same command goes on") from None
    print(
        f"{counts['rows']} rows: {counts['written']} {o.to} written, {counts['ties']} ties dropped, "
        f"{counts['broken']} broken, in {out}\n"
        f"next, or with train rankdpo: {pasted('train', 'dpo', '--model', 'MODEL', '--train_data_dir', out)}"
    )
    return 0
