"""Prompts to evaluate on, with the categories that a report breaks its figures down by."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_align.commands.sources import read_prompts
from diffusion_align.models.hub import asset
from diffusion_align.shapes import Caption, parse, sample_captions

HELD_OUT = "held-out"
HELD_OUT_SEED = 0  # of the captions, apart from --seed, so that another noise is tried on the same prompts
SHIPPED = {"parti": "prompts/parti.tsv", "geneval": "prompts/geneval.jsonl"}
CATEGORY_KEYS = ("category", "categories", "challenge", "tag", "skills", "style")
"""What lists call them, whatever the case: PartiPrompts Category and Challenge, GenEval tag, GenEval 2 skills."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, the categories it is in, as "key: value", and whatever else its list says of it."""

    text: str
    categories: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def evaluation_prompts(source: str, n: int) -> list[Prompt]:
    """The first n prompts of a list: a shipped one's name, a file, or captions of the embedded world held out.

    Those are drawn as the training captions are, so short ones come more than once, each time from another noise; their
    categories are what they ask for.

    Raises:
        ValueError: the file is not what its name says, or holds no prompt. FileNotFoundError: there is none.
    """
    if source == HELD_OUT:
        return [Prompt(text, kinds(parse(text))) for text in sample_captions(n, HELD_OUT_SEED, split="held-out")]
    path = asset(SHIPPED[source]) if source in SHIPPED and not Path(source).exists() else Path(source).expanduser()
    if path.suffix == ".tsv":
        rows = list(csv.DictReader(_text(path).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    elif path.suffix == ".jsonl":
        rows = [_row(path, number, line) for number, line in enumerate(_text(path).splitlines())]
    elif path.suffix == ".json":
        rows = json.loads(_text(path))
        rows = [{"prompt": row} if isinstance(row, str) else row for row in rows] if isinstance(rows, list) else None
    else:
        return [_in_world(Prompt(text)) for text in read_prompts(str(path))[:n]]
    found = [_prompt(path, number, row) for number, row in enumerate(rows or []) if row]
    if not found:
        raise ValueError(f"{path}: holds no prompt")
    return found[:n]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8") from error


def _row(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line) if line.strip() else None
    except ValueError as error:
        raise ValueError(f"{path} line {number + 1} is not JSON: {error}") from error


def _prompt(path: Path, number: int, row: Any) -> Prompt:
    named = {str(key).lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
    text = named.get("prompt", named.get("caption"))
    if not isinstance(text, str) or not text.strip():
        has = ", ".join(named) or type(row).__name__
        raise ValueError(f"{path} row {number}: there is no prompt in it; it has {has}")
    categories = []
    for key in CATEGORY_KEYS:
        value = named.get(key)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and one.strip():
                categories.append(f"{key}: {one.strip()}")
    extra = {key: value for key, value in row.items() if str(key).lower() not in ("prompt", "caption")}
    return _in_world(Prompt(text.strip(), tuple(categories), extra))


def _in_world(prompt: Prompt) -> Prompt:
    """With the kinds of an embedded caption, if it is one and its list gave none."""
    caption = caption_of(prompt.text)
    return prompt if prompt.categories or caption is None else Prompt(prompt.text, kinds(caption), prompt.extra)


def caption_of(text: str) -> Caption | None:
    """The caption of the embedded world that a text is, or None."""
    try:
        return parse(text)
    except ValueError:
        return None


def kinds(caption: Caption) -> tuple[str, ...]:
    """GenEval's tasks, as far as a caption of the embedded world has them."""
    return ({"single": "task: single object", "count": "task: counting", "pair": "task: position"}[caption.kind],)


def by_category(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Numbers of the prompts in each category, in the order in which categories first come."""
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        for category in prompt.categories:
            found.setdefault(category, []).append(number)
    return found
