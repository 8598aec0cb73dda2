"""Reads the pairs, rankings or prompts that the options name, on this disk or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.commands.data.fetch import fetch_pairs, read_options
from diffusion_align.commands.sources import pairs_on_disk, present_pairs, read_prompts
from diffusion_align.data import read_pairs, read_rankings
from diffusion_align.data.bad_rows import BadRow
from diffusion_align.methods.entry import Entry
from diffusion_align.models.hub import asset, on_hub
from diffusion_align.options import GivenPictures, TrainOnline
from diffusion_align.origins import DATA_SETS
from diffusion_align.shapes import sample_captions

TINY_PROMPTS, TINY_SEED = 4000, 7  # of the training split; a seed that neither build_tiny nor evaluate uses


@dataclass(frozen=True)
class Items:
    """The entries of a data set (pairs, rankings or prompts) in order, its bad rows, and a summary line."""

    items: list[Any]
    bad_rows: Sequence[BadRow]
    summary: str


def source_name(o: GivenPictures) -> str:
    """The path or name of the pairs or rankings, or its new address if it has moved."""
    return present_pairs(o.train_data_dir or o.dataset_name or "")


def items_on_disk(entry: Entry[Any], o: Any) -> bool:
    """Whether they can be read without a download."""
    return entry.data == "prompts" or source_path(entry, o) is not None


def read_items(entry: Entry[Any], o: Any) -> Items:
    """The items that the options name.

    Raises:
        FileNotFoundError, DataError, ValueError: the source does not exist, or it has too many bad rows or
            no prompt.
    """
    if entry.data == "prompts":
        prompts = training_prompts(o)
        return Items(prompts, (), f"{len(prompts)} of {o.prompts}")
    split, path = o.dataset_split_name or "train", source_path(entry, o)
    options = read_options(o)
    if path is None:
        config = getattr(o, "dataset_config_name", None)
        most = o.max_train_samples
        path = fetch_pairs(source_name(o), split, o.cache_dir, config=config, most=most, options=options)
    if entry.data == "rankings":
        items, counts = read_rankings(path, split=split, max_bad_fraction=o.max_bad_fraction, options=options)
    else:
        ties = getattr(o, "keep_ties", False)
        items, counts = read_pairs(
            path, split=split, max_bad_fraction=o.max_bad_fraction, keep_ties=ties, options=options
        )
    used = items[: o.max_train_samples]
    first = f", of which the first {len(used)}" if len(used) < len(items) else ""
    return Items(list(used), counts.bad_rows, f"{counts}{first}")


def training_prompts(o: TrainOnline) -> list[str]:
    """The prompts that the options name. Raises ValueError if there are none."""
    if o.prompts == "tiny":
        return sample_captions(o.num_prompts or TINY_PROMPTS, TINY_SEED)
    return read_prompts(o.prompts or "")[: o.num_prompts]


def source_path(entry: Entry[Any], o: GivenPictures) -> Path | None:
    """The path of pairs or rankings, or None for a data set on the hub.

    --train_data_dir is always a path. Raises FileNotFoundError if the path does not exist and is the name of a
    repository. Other missing paths raise an error later, when they are read.
    """
    name = source_name(o)
    if entry.data == "rankings" and name == "tiny":
        return _tiny_rankings()
    path = pairs_on_disk(name, hub=o.train_data_dir is None)
    if path is not None and not path.exists() and name in DATA_SETS and DATA_SETS[name].make:
        raise FileNotFoundError(f"{name}: it is not published; `{DATA_SETS[name].make}` makes a substitute")
    if path is not None and not path.exists() and on_hub(name):
        raise FileNotFoundError(f"{name}: no such path here; for a data set on the hub: --dataset_name {name}")
    return path


def _tiny_rankings() -> Path:
    try:
        return asset("tiny_rankings.parquet")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}, or make some in minutes: diffusion-align data synth --models tiny --prompts tiny --rewards tiny "
            "--guidance 1 --out synth, then --train_data_dir synth/rankings.parquet"
        ) from None
