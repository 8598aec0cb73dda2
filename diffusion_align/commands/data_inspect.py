"""`data inspect`: what a file or folder holds, how it would be read, and what it is good for. Reads no picture."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from diffusion_align.commands.sources import fetch_pairs, pairs_on_disk, present_pairs
from diffusion_align.data.formats import Format
from diffusion_align.data.match import wanted
from diffusion_align.data.recognise import Source, recognise
from diffusion_align.data.records import PROMPTS
from diffusion_align.data.summary import Summary, summarise
from diffusion_align.data.tables import SUFFIXES, columns_of
from diffusion_align.options.data import DataInspect
from diffusion_align.printable import printable


def data_inspect(options: DataInspect) -> int:
    """Print layout, mapping, counts, first broken rows, and the command that would train on it."""
    assert options.path is not None  # the options' own check says so
    name = present_pairs(options.path)
    path = pairs_on_disk(name)
    if path is None:
        print(f"fetching the parquet files of {name}, split {options.split}, as a training would", flush=True)
        path = fetch_pairs(name, options.split, None)
    source = recognise(path, options.split)
    by_name = f"--dataset_name {name}" if path != Path(name).expanduser() else None
    print("\n".join(map(printable, describe(source, summarise(source), by_name))))
    return 0


def describe(source: Source, found: Summary, by_name: str | None = None) -> Iterator[str]:
    """The report, line by line. `by_name` is the flag that names a set whose path nobody types."""
    known = source.format
    first, *others = source.files
    files = f"{len(source.files):,} files" if others else first.name
    yield f"layout     {known.name}, in {files}"
    columns = columns_of(first) if first.suffix in SUFFIXES else None
    mapping = known.mapping if columns is None else present(known, columns)
    width = max(len(theirs) for theirs, _ in mapping)
    for number, (theirs, ours) in enumerate(mapping):
        yield f"{'' if number else 'mapping':11}{theirs:{width}} -> {ours}"
    unread = [] if columns is None else [name for name in columns if name not in wanted(known, columns)]
    if unread:
        yield f"           not read: {', '.join(unread)}"
    yield f"rows       {found.rows:,}"
    if known.holds in ("pairs", "rankings"):
        lists = sum(count for size, count in found.sizes.items() if size > 2)
        sizes = ", ".join(f"{count:,} of {size}" for size, count in sorted(found.sizes.items()))
        yield f"pairs      {found.pairs:,}"
        several = f" ({sizes})" if lists else ""
        yield f"rankings   {found.used:,}, of them {lists:,} of more than two pictures{several}"
        yield f"ties       {found.ties:,}, dropped" + (f"; a tie: {known.tie}" if known.tie else "")
        if known.weight:
            low, high = found.weights or (1.0, 1.0)
            yield f"weights    {known.weight}; here {low:g} to {high:g}"
    else:
        yield f"{known.holds:11}{found.used:,}"
    empty = f", {found.empty:,} empty" if found.empty else ""
    yield f"prompts    the longest has {found.longest:,} characters{empty}"
    yield f"broken     {found.broken:,}"
    for row in found.bad:
        yield f"           {row.row}: {row.reason}"
    if source.unread:
        passed = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(source.unread.items()))
        yield f"passed     members that are never read: {passed}"
    if known.known:
        yield f"known as   {known.known}"
    for number, line in enumerate(_uses(source, found, by_name)):
        yield f"{'' if number else 'use':11}{line}"


def present(known: Format, columns: list[str]) -> list[tuple[str, str]]:
    """The layout's mapping without the columns that this table lacks, and with its own name for the prompt."""
    read, named = set(wanted(known, columns)), {name for names in known.needs for name in names} | set(known.may)
    prompt = next(name for name in PROMPTS if name in read)
    shown = [(prompt if ours == "prompt" else theirs, ours) for theirs, ours in known.mapping]
    words = [set(re.findall(r"\w+", theirs)) & named for theirs, _ in shown]
    return [line for line, mine in zip(shown, words, strict=True) if not mine or mine & set(columns)]


def _uses(source: Source, found: Summary, by_name: str | None) -> Iterator[str]:
    """Commands that take this set as it is."""
    path = shlex.quote(str(source.path))
    split = f" --dataset_split_name {source.split}" if source.path.is_dir() and source.split != "train" else ""
    if not found.used:
        yield "none: nothing is left"
    elif source.format.holds in ("pairs", "rankings"):
        verbs = ("dpo", "rankdpo") if source.format.holds == "pairs" else ("rankdpo", "dpo")
        for verb in verbs:
            yield f"diffusion-align train {verb} --model MODEL {by_name or f'--train_data_dir {path}'}{split}"
        yield f"diffusion-align data check {path}{split}   (pictures were not looked at)"
    elif source.format.holds == "prompts":
        yield f"diffusion-align train d3po --model MODEL --reward NAME --prompts {path}   (or spo, prdp, ddpo)"
        yield f"diffusion-align data synth --models MODEL --rewards NAME --prompts {path}"
    else:
        yield "none: captions say nothing of what people prefer, and no training here learns from captions alone"
