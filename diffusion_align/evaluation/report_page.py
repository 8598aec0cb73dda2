"""The report's page: one HTML file without script, link or outside resource. All text passes `escape`.

Tabs, the order of the pictures and the slider over a pair are radio buttons and style: a page that holds other people's
text runs nothing at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .charts import line_chart
from .escape import escape
from .gallery import grid, radios
from .style import STYLE
from .tables import categories, distances, gap_row, metric_rows, models, table, variety, win_rows

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CURVES = (
    ("Loss", ("loss",)),
    ("Squared error above the reference, mean over dims: down is learnt", ("winner_error_gap", "loser_error_gap")),
    ("Implicit accuracy: share of pairs whose winner gained more than its loser", ("implicit_accuracy",)),
)
# Pictures first: people would rather look than read. The sentence above the tabs says the result.
TABS = {"tab-pictures": "Pictures", "tab-result": "Result", "tab-kinds": "Breakdown", "tab-how": "How it was made"}
CONFIG_LIMIT = 50_000


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
    metrics = report["metrics"]
    level = f"{100 * metrics[report['headline']['metric']]['level']:g} % interval" if metrics else ""
    head = ("", "base", "tuned", "difference", "", level, "normal check", "n")
    config = (
        escape(json.dumps(report["config"], indent=2, ensure_ascii=False), CONFIG_LIMIT) if report["config"] else ""
    )
    resamples = report["bootstrap"]["resamples"]
    gaps = report["reward_gap"]
    gap_rows = [gap_row(reward, judge, gap) for reward, judges in gaps.items() for judge, gap in judges.items()]
    source = escape(report.get("features", "none"))
    panels = {
        "tab-pictures": [_section("Pictures", grid(report, shots), "Base and tuned start from the same noise.")],
        "tab-result": [
            _section("Attributes", table(head, metric_rows(metrics, share=True)),
                     "Percent of the pictures to which the attribute applies; differences in points, pair by pair, "
                     f"with a bootstrap interval of {resamples:,} resamples."),
            _section("Rewards", table(head, metric_rows(metrics, share=False)), "Means, in the reward's own unit."),
            _section("Win rate",
                     table(("", "win rate %", level, "wins", "ties", "losses", "n"), win_rows(metrics)),
                     "How often the tuned picture is the better one; a tie counts half; Wilson's interval."),
            _section("Reward against judge",
                     table(("reward", "judge", "reward gain, sd", "judge gain, points", "agreement %", level,
                             "told apart", "reward up, judge lost", "n"), gap_rows),
                     "Agreement: how often the reward prefers the judge's picture, among pairs that the judge tells "
                     "apart. Much reward and little judge is what reward hacking looks like."),
        ],
        "tab-kinds": [
            _section("Models and samplers", models(report), "Each against the base by the same sampler and noise."),
            _section("Categories", categories(report), "The first model by the first sampler."),
            _section("Variety", variety(report),
                     f"Mean of 1 - cosine between pictures of one prompt, features: {source}. Less is collapse."),
            _section("Distance to real pictures", distances(report),
                     f"Features: {source}, so not comparable with figures from other networks. CMMD is 1000 times the "
                     "squared distance; few: below 2,048 pictures a Frechet distance says more about their number."),
        ],
        "tab-how": [
            _section("Training", _curves(rows)),
            _section("What made this", f"<dl>{_facts({**report['facts'], **report['versions']})}</dl>"),
            _section("Config", f"<pre>{config}</pre>" if config else ""),
        ],
    }  # fmt: skip
    full = {tab: "".join(parts) for tab, parts in panels.items() if any(parts)}
    tabs = radios("tab", {tab: TABS[tab] for tab in full})
    body = "".join(f'<div class="panel {tab}">{content}</div>' for tab, content in full.items())
    title = escape(report["title"])
    # A number stays on the line of its unit.
    lead = escape(report["headline"]["sentence"]).replace(" %", "&nbsp;%").replace(" = ", "&nbsp;=&nbsp;")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CSP}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{title}</h1><p class="lead">{lead}</p>'
        f"{tabs}{body}</main></body></html>\n"
    )
