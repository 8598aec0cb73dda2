"""The report's pictures: pairs in a grid that can be put in another order, or one picture over the other."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from ..rewards import to_uint8
from .escape import escape
from .tables import number

MAX_SIDE = 256  # pixels of a picture in the page; larger ones are reduced
WHY = {"gain": "largest gains", "loss": "largest losses", "drawn": "drawn without looking"}
ORDERS = {"by-gain": "largest gains first", "by-loss": "largest losses first", "by-choice": "as chosen"}
VIEWS = {"beside": "side by side", "slider": "one over the other: drag its corner"}


def data_uri(picture: Tensor) -> str:
    """A picture [3,H,W] in [0, 1] as a PNG inside an address, reduced to `MAX_SIDE` when larger."""
    image = Image.fromarray(to_uint8(picture).permute(1, 2, 0).cpu().numpy())
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _verdict(value: float | None, *, share: bool) -> str:
    if not share:
        return f"<b>{number(value)}</b>"
    if value is None:
        return ""
    return '<b class="up" title="holds">✓</b>' if value >= 0.5 else '<b class="down" title="does not hold">✗</b>'


def _pair(
    entry: Mapping[str, Any], place: Mapping[str, int], headline: str | None, model: str, shots: tuple[Tensor, Tensor]
) -> str:
    sides = []
    for name, called, shot in zip(("base", "tuned"), ("base", escape(model)), shots, strict=True):
        verdict = "" if headline is None else _verdict(entry[name][headline], share="/" in headline)
        crisp = ' class="crisp"' if max(shot.shape) <= 128 else ""
        sides.append(
            f'<div class="{name}"><span class="side">{called} {verdict}</span>'
            f'<img{crisp} alt="{called}" src="{data_uri(shot)}"></div>'
        )
    caption = f'<figcaption dir="auto">{escape(entry["prompt"])}</figcaption>'
    order = ";".join(f"--{key}:{value}" for key, value in place.items())
    return f'<figure style="{order}"><div class="two">{"".join(sides)}</div>{caption}</figure>'


def grid(report: Mapping[str, Any], shots: Mapping[int, tuple[Tensor, Tensor]]) -> str:
    headline = report["headline"]["metric"]
    chosen = [entry["index"] for entry in report["shown"] if entry["index"] in shots]
    if not chosen:
        return ""

    def gain(index: int) -> float:
        if headline is None:
            return 0.0
        before, after = (report["prompts"][index][side][headline] for side in ("base", "tuned"))
        return 0.0 if before is None or after is None else after - before

    # Pictures were chosen best gains first, then worst losses, then by chance: stable sorts keep that inside a tie.
    best, worst = (sorted(chosen, key=lambda i: -sign * gain(i)) for sign in (1, -1))
    places = {i: {"g": best.index(i), "l": worst.index(i)} for i in chosen}
    pairs = [_pair(report["prompts"][i], places[i], headline, report["model"], shots[i]) for i in chosen]
    counts = ", ".join(f"{sum(e['why'] == why for e in report['shown'])} {words}" for why, words in WHY.items())
    controls = radios("sort", ORDERS) + radios("view", VIEWS)
    return f'<p class="note">{escape(counts)}.</p>{controls}<div class="grid">{"".join(pairs)}</div>'


def radios(name: str, labels: Mapping[str, str]) -> str:
    """A row of choices, the first one taken; `STYLE` says what each does."""
    parts = [
        f'<input type="radio" name="{name}" id="{key}"{" checked" if i == 0 else ""}><label for="{key}">{words}</label>'
        for i, (key, words) in enumerate(labels.items())
    ]
    return f'<div class="choice">{"".join(parts)}</div>'
