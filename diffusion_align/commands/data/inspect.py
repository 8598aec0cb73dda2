"""`data inspect`: what a file or folder holds, how it would be read, and what it is good for. Reads no picture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from diffusion_align.commands.data.fetch import fetch_pairs, read_options
from diffusion_align.commands.data.summary import DataSummary, summarise_data
from diffusion_align.commands.printed_commands import command_line
from diffusion_align.commands.sources import pairs_on_disk, present_pairs
from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.rows.known_layouts import Layout
from diffusion_align.data.rows.listing import HIDDEN
from diffusion_align.data.rows.raw_rows import PROMPT_COLUMNS
from diffusion_align.data.rows.recognise import DataSource, recognise
from diffusion_align.data.rows.tables.table_rows import is_table, our_columns
from diffusion_align.models.hub import on_hub
from diffusion_align.options.data import DataInspect
from diffusion_align.system.printable import printable


def data_inspect(options: DataInspect) -> int:
    """Print layout, mapping, counts, first bad rows, and the command that would train on it.

    Raises:
        DataError: nothing there, or nothing known. FileNotFoundError: not on the hub, where that was asked.
    """
    o = options
    name = present_pairs(o.dataset_name or o.path or "")
    path = pairs_on_disk(name, hub=o.dataset_name is not None)
    if path is None:
        print(f"fetching {name}, split {o.split}, as a training would", flush=True)
        path = fetch_pairs(name, o.split, None, options=read_options(o))
    if o.dataset_name is None and not path.exists() and on_hub(name):
        raise DataError(f"{name}: no such file or folder here; for a data set on the hub: --dataset_name {name}")
    source = recognise(path, o.split, options=read_options(o))
    by_name = name if path != Path(name).expanduser() else None
    print("\n".join(map(printable, describe(source, summarise_data(source), by_name))))
    return 0


def describe(source: DataSource, found: DataSummary, by_name: str | None = None) -> Iterator[str]:
    """The report, line by line. `by_name` is the name of a set whose path nobody types."""
    layout = source.layout
    first, *others = source.files
    files = f"{len(source.files):,} files" if others else first.name
    yield f"layout     {layout.name}, in {files}"
    named = our_columns(first, source.options) if is_table(first) else {}
    columns = list(named) if is_table(first) else None
    mapping = layout.mapping if columns is None else present(layout, columns)
    width = max(len(theirs) for theirs, _ in mapping)
    for number, (theirs, ours) in enumerate(mapping):
        yield f"{'' if number else 'mapping':11}{theirs:{width}} -> {ours}"
    renamed = [f"{theirs} as {ours}" for ours, theirs in named.items() if ours != theirs]
    if renamed:
        yield f"           columns read under other names: {', '.join(renamed)}"
    unread = [] if columns is None else [name for name in columns if name not in layout.reads(columns)]
    if unread:
        yield f"           not read: {', '.join(unread)}"
    yield f"rows       {found.rows:,}"
    if layout.compares:
        lists = sum(count for size, count in found.sizes.items() if size > 2)
        sizes = ", ".join(f"{count:,} of {size}" for size, count in sorted(found.sizes.items()))
        yield f"pairs      {found.pairs:,}"
        several = f" ({sizes})" if lists else ""
        yield f"rankings   {found.used:,}, of them {lists:,} of more than two pictures{several}"
        yield f"ties       {found.ties:,}, dropped" + (f"; a tie: {layout.tie}" if layout.tie else "")
        if layout.weight:
            low, high = found.weights or (1.0, 1.0)
            yield f"weights    {layout.weight}; here {low:g} to {high:g}"
    else:
        yield f"{layout.holds:11}{found.used:,}"
    empty = f", {found.empty:,} empty" if found.empty else ""
    yield f"prompts    the longest has {found.longest:,} characters{empty}"
    yield f"broken     {found.broken:,}"
    for row in found.bad:
        yield f"           {row.row}: {row.reason}"
    unread = {suffix: count for suffix, count in source.unread.items() if suffix != HIDDEN}
    if unread:
        passed = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(unread.items()))
        yield f"passed     members that are never read: {passed}"
    if source.unread[HIDDEN]:
        yield f"hidden     {source.unread[HIDDEN]:,} files or folders left out, such as ._x.png, .cache or Thumbs.db"
    if layout.known:
        yield f"known as   {layout.known}"
    for number, line in enumerate(_uses(source, found, by_name)):
        yield f"{'' if number else 'use':11}{line}"


def present(layout: Layout, columns: list[str]) -> list[tuple[str, str]]:
    """The layout's mapping without the columns that this table lacks, and with its own name for the prompt."""
    read, named = set(layout.reads(columns)), {name for names in layout.needs for name in names} | set(layout.may)
    prompt = next(name for name in PROMPT_COLUMNS if name in read)
    shown = [(prompt if ours == "prompt" else theirs, ours) for theirs, ours in layout.mapping]
    words = [set(re.findall(r"\w+", theirs)) & named for theirs, _ in shown]
    return [line for line, mine in zip(shown, words, strict=True) if not mine or mine & set(columns)]


def _uses(source: DataSource, found: DataSummary, by_name: str | None) -> Iterator[str]:
    """Commands that take this set as it is."""
    path, named = source.path, source.path.is_dir() and source.split != "train"
    split = ["--dataset_split_name", source.split] if named else []
    data = ["--dataset_name", by_name] if by_name else ["--train_data_dir", path]
    told = [word for ours, theirs in source.options.columns.items() for word in ("--columns", f"{ours}={theirs}")]
    split += told + (["--encoding", source.options.encoding] if source.options.encoding else [])
    if not found.used:
        yield "none: nothing is left"
    elif source.layout.compares:
        verbs = ("dpo", "rankdpo") if source.layout.holds == "pairs" else ("rankdpo", "dpo")
        for verb in verbs:
            yield command_line("train", verb, "--model", "MODEL", *data, *split)
        yield f"{command_line('data', 'check', path, *split)}   # pictures were not looked at"
    elif source.layout.holds == "prompts":
        prompts = ["--prompts", path]
        line = command_line("train", "d3po", "--model", "MODEL", "--reward", "NAME", *prompts)
        yield f"{line}   # or spo, prdp, ddpo"
        yield command_line("data", "synth", "--models", "MODEL", "--rewards", "NAME", *prompts)
    else:
        yield "none: captions say nothing of what people prefer, and no training here learns from captions alone"
