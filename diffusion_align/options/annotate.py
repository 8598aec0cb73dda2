"""The options of `data annotate`."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass

from .names import UsageError
from .schema import option


@dataclass(frozen=True)
class Annotate:
    # fmt: off
    folder: str | None = option(None, "data", "folder that `sample --num_images_per_prompt K` wrote: pictures and samples.json", path="in")

    mode: str = option("best", "page", "best: choose one of a prompt's K pictures; rank: choose them in order of preference; pairs: two at a time", choices=("best", "rank", "pairs"))
    seed: int = option(0, "page", "seed of the places on the page and the order of pairs", at_least=0)
    port: int | None = option(None, "page", "port on 127.0.0.1 (default: a free one)", at_least=1024, at_most=65535)

    export: bool = option(False, "output", "only write pairs.parquet and rankings.jsonl from the choices so far")
    # fmt: on


def check_annotate(options: Annotate) -> None:
    """Check the options together.

    Raises:
        UsageError: no folder.
    """
    if options.folder is None:
        raise UsageError("which pictures? diffusion-align data annotate FOLDER")
