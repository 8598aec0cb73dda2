"""The report's page, `templates/report.html.j2` filled in: one HTML file without script, link or outside resource.

Tabs, the order of the pictures and the slider over a pair are radio buttons and style: a page that holds other people's
text runs nothing at all.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from PIL import Image
from torch import Tensor

from ..rewards import to_uint8
from .charts import interval_mark, line_chart
from .markup import STYLE, escape, render

CURVES = (
    ("Loss", ("loss",)),
    ("Squared error above the reference, mean over dims: down is learned", ("winner_error_gap", "loser_error_gap")),
    ("Implicit accuracy: fraction of pairs whose winner gained more than its loser", ("implicit_accuracy",)),
)
CONFIG_LIMIT = 50_000  # characters
MAX_SIDE = 256  # pixels of a picture in the page; larger ones are reduced
CRISP_SIDE = 128  # pixels up to which a picture is enlarged without smoothing
WHY = {"gain": "largest gains", "loss": "largest losses", "drawn": "drawn without looking"}


def render_report(
    report: Mapping[str, Any], shots: Mapping[int, tuple[Tensor, Tensor]], rows: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The page of what report.json holds; `shots` are the pictures to show by prompt index, `rows` the training's."""
    metrics = report["metrics"]
    facts = {**report["facts"], **report["versions"]}
    config = json.dumps(report["config"], indent=2, ensure_ascii=False) if report["config"] else ""
    counts = (f"{sum(e['why'] == why for e in report['shown'])} {words}" for why, words in WHY.items())
    return render("report.html.j2", {
        "report": report,
        "style": STYLE,
        # A number stays on the line of its unit.
        "lead": report["headline"]["sentence"].replace(" %", "\xa0%").replace(" = ", "\xa0=\xa0"),
        "level": f"{100 * metrics[report['headline']['metric']]['level']:g} % interval" if metrics else "",
        "pairs": _pairs(report, shots),
        "counts": ", ".join(counts),
        "attributes": _with_marks({name: m for name, m in metrics.items() if "/" in name}, one_axis=True),
        "rewards": _with_marks({name: m for name, m in metrics.items() if "/" not in name}, one_axis=False),
        "curves": [(title, chart) for title, keys in CURVES if (chart := line_chart(_series(rows, keys), title=title))],
        "facts": {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in facts.items()},
        "config": escape(config, CONFIG_LIMIT),
    })  # fmt: skip


def _series(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[tuple[str, list[float], list[float]]]:
    """Curves of some columns of metrics.jsonl; rows without a number there are left out."""
    series = []
    for key in keys:
        known = [row for row in rows if row.get("step") is not None and isinstance(row.get(key), int | float)]
        xs, ys = ([float(row[name]) for row in known] for name in ("step", key))
        series.append((key.replace("_", " "), xs, ys))
    return series


def _with_marks(metrics: Mapping[str, Any], *, one_axis: bool) -> list[tuple[str, Any, str]]:
    """Each metric and the mark of its interval; all on `one_axis` where they share a unit."""
    marked = []
    for name, m in metrics.items():
        peers = metrics.values() if one_axis else [m]
        reach = max((abs(p[end]) for p in peers for end in ("low", "high") if p[end] is not None), default=0.0)
        known = m["low"] is not None
        marked.append((name, m, interval_mark(m["low"], m["difference"], m["high"], reach) if known else ""))
    return marked


def _pairs(report: Mapping[str, Any], shots: Mapping[int, tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """The pairs to show, each with its place by largest gain and by largest loss."""
    headline = report["headline"]["metric"]
    chosen = [entry["index"] for entry in report["shown"] if entry["index"] in shots]

    def gain(index: int) -> float:
        if headline is None:
            return 0.0
        before, after = (report["prompts"][index][side][headline] for side in ("base", "tuned"))
        return 0.0 if before is None or after is None else after - before

    # Pictures were chosen best gains first, then worst losses, then by chance: stable sorts keep that inside a tie.
    best, worst = (sorted(chosen, key=lambda i: -sign * gain(i)) for sign in (1, -1))
    pairs = []
    for i in chosen:
        entry = report["prompts"][i]
        sides = [
            {
                "side": side,
                "name": name,
                "value": None if headline is None else entry[side][headline],
                "crisp": max(shot.shape) <= CRISP_SIDE,
                "address": Markup(data_uri(shot)),
            }
            for side, name, shot in zip(("base", "tuned"), ("base", report["model"]), shots[i], strict=True)
        ]
        pairs.append({"prompt": entry["prompt"], "by_gain": best.index(i), "by_loss": worst.index(i), "sides": sides})
    return pairs


def data_uri(picture: Tensor) -> str:
    """A picture [3,H,W] in [0, 1] as a PNG inside an address, reduced to `MAX_SIDE` when larger."""
    image = Image.fromarray(to_uint8(picture).permute(1, 2, 0).cpu().numpy())
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
