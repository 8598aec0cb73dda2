"""The report's page: one HTML file without script, link or outside resource. All text passes `escape`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from ..rewards import to_uint8
from .charts import interval_mark, line_chart
from .escape import escape
from .style import STYLE

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MAX_SIDE = 256  # pixels of a picture in the page; larger ones are reduced
CURVES = (
    ("Loss", ("loss",)),
    ("Squared error above the reference, mean over dims: down is learnt", ("winner_error_gap", "loser_error_gap")),
    ("Implicit accuracy: share of pairs whose winner gained more than its loser", ("implicit_accuracy",)),
)
WHY = {"gain": "largest gains", "loss": "largest losses", "drawn": "drawn without looking"}
CONFIG_LIMIT = 50_000


def number(value: float | None, *, share: bool = False, signed: bool = False) -> str:
    """A figure as a page shows it: shares in percent, others to four digits, a dash for nothing."""
    if value is None:
        return "–"
    return (f"{100 * value:{'+' * signed}.1f}" if share else f"{value:{'+' * signed}.4g}").replace("-", "−")


def _interval(low: float | None, high: float | None, *, share: bool, signed: bool = False) -> str:
    if low is None or high is None:
        return "–"
    return f"{number(low, share=share, signed=signed)} to {number(high, share=share, signed=signed)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already: every caller escapes what it did not write itself."""
    if not rows:
        return ""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _metric_rows(metrics: Mapping[str, Any], *, share: bool) -> list[list[str]]:
    chosen = {name: m for name, m in metrics.items() if ("/" in name) == share}
    rows = []
    for name, m in chosen.items():
        # Attributes share a unit and so an axis; each reward has its own.
        peers = list(chosen.values()) if share else [m]
        reach = max((abs(p[end]) for p in peers for end in ("low", "high") if p[end] is not None), default=0.0)
        mark = interval_mark(m["low"], m["difference"], m["high"], reach) if m["low"] is not None else ""
        rows.append([
            escape(name), number(m["base"], share=share), number(m["tuned"], share=share),
            number(m["difference"], share=share, signed=True), mark,
            _interval(m["low"], m["high"], share=share, signed=True),
            _interval(m["normal_low"], m["normal_high"], share=share, signed=True), str(m["n"]),
        ])  # fmt: skip
    return rows


def _win_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    return [
        [escape(name), number(m["win_rate"], share=True), _interval(m["win_low"], m["win_high"], share=True),
         str(m["wins"]), str(m["ties"]), str(m["losses"]), str(m["n"])]
        for name, m in metrics.items() if "/" not in name or name.endswith("/all")
    ]  # fmt: skip


def _gap_row(reward: str, judge: str, g: Mapping[str, Any]) -> list[str]:
    return [
        escape(reward), escape(judge),
        number(g["reward_gain"], signed=True), number(g["judge_gain"], share=True, signed=True),
        number(g["agreement"], share=True), _interval(g["agreement_low"], g["agreement_high"], share=True),
        str(g["told_apart"]), str(g["table"][0][2]), str(g["n"]),
    ]  # fmt: skip


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


def _pair(entry: Mapping[str, Any], headline: str, shots: tuple[Tensor, Tensor]) -> str:
    sides = []
    for name, shot in zip(("base", "tuned"), shots, strict=True):
        verdict = _verdict(entry[name][headline], share="/" in headline)
        crisp = ' class="crisp"' if max(shot.shape) <= 128 else ""
        sides.append(
            f'<div><span class="side">{name} {verdict}</span><img{crisp} alt="{name}" src="{data_uri(shot)}"></div>'
        )
    caption = f'<figcaption dir="auto">{escape(entry["prompt"])}</figcaption>'
    return f'<figure><div class="two">{"".join(sides)}</div>{caption}</figure>'


def _grid(report: Mapping[str, Any], shots: Mapping[int, tuple[Tensor, Tensor]]) -> str:
    parts = []
    for why, words in WHY.items():
        chosen = [entry["index"] for entry in report["shown"] if entry["why"] == why and entry["index"] in shots]
        if chosen:
            pairs = [_pair(report["prompts"][i], report["headline"]["metric"], shots[i]) for i in chosen]
            parts.append(f'<h3>{words.capitalize()} ({len(chosen)})</h3><div class="grid">{"".join(pairs)}</div>')
    return "".join(parts)


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for title, keys in CURVES:
        series = []
        for key in keys:
            points = [
                (r["step"], r[key]) for r in rows if r.get("step") is not None and isinstance(r.get(key), int | float)
            ]
            series.append((key.replace("_", " "), [float(p[0]) for p in points], [float(p[1]) for p in points]))
        chart = line_chart(series, title=title)
        parts.append(f"<h3>{escape(title)}</h3>{chart}" if chart else "")
    return "".join(parts)


def _facts(facts: Mapping[str, Any]) -> str:
    return "".join(f"<dt>{escape(key)}</dt><dd>{escape(_as_text(value))}</dd>" for key, value in facts.items())


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _section(title: str, body: str, note: str = "") -> str:
    above = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{above}{body}</section>" if body else ""


def render(
    report: Mapping[str, Any], shots: Mapping[int, tuple[Tensor, Tensor]], rows: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The page of what report.json holds; `shots` are the pictures to show by prompt index, `rows` the training's."""
    metrics, level = report["metrics"], f"{100 * report['metrics'][report['headline']['metric']]['level']:g} % interval"
    head = ("", "base", "tuned", "difference", "", level, "normal check", "n")
    config = (
        escape(json.dumps(report["config"], indent=2, ensure_ascii=False), CONFIG_LIMIT) if report["config"] else ""
    )
    resamples = report["bootstrap"]["resamples"]
    gaps = report["reward_gap"]
    gap_rows = [_gap_row(reward, judge, gap) for reward, judges in gaps.items() for judge, gap in judges.items()]
    sections = [
        _section("Attributes", _table(head, _metric_rows(metrics, share=True)),
                 "Percent of the pictures to which the attribute applies; differences in points, pair by pair, with a "
                 f"bootstrap interval of {resamples:,} resamples."),
        _section("Rewards", _table(head, _metric_rows(metrics, share=False)), "Means, in the reward's own unit."),
        _section("Win rate",
                 _table(("", "win rate %", level, "wins", "ties", "losses", "n"), _win_rows(metrics)),
                 "How often the tuned picture is the better one; a tie counts half; Wilson's interval."),
        _section("Reward against judge",
                 _table(("reward", "judge", "reward gain, sd", "judge gain, points", "agreement %", level,
                         "told apart", "reward up, judge lost", "n"), gap_rows),
                 "Agreement: how often the reward prefers the judge's picture, among pairs that the judge tells apart. "
                 "Much reward and little judge is what reward hacking looks like."),
        _section("Pictures", _grid(report, shots), "Base and tuned start from the same noise."),
        _section("Training", _curves(rows)),
        _section("What made this", f"<dl>{_facts({**report['facts'], **report['versions']})}</dl>"),
        _section("Config", f"<pre>{config}</pre>" if config else ""),
    ]  # fmt: skip
    title = escape(report["title"])
    # A number stays on the line of its unit.
    lead = escape(report["headline"]["sentence"]).replace(" %", "&nbsp;%").replace(" = ", "&nbsp;=&nbsp;")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CSP}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{title}</h1><p class="lead">{lead}</p>'
        f"{''.join(sections)}</main></body></html>\n"
    )
