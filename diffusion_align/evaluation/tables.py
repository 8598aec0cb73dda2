"""The report's tables as HTML. What they did not write themselves passes `escape`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .charts import interval_mark
from .escape import escape


def number(value: float | None, *, share: bool = False, signed: bool = False) -> str:
    """A figure as a page shows it: shares in percent, others to four digits, a dash for nothing."""
    if value is None:
        return "–"
    return (f"{100 * value:{'+' * signed}.1f}" if share else f"{value:{'+' * signed}.4g}").replace("-", "−")


def interval(low: float | None, high: float | None, *, share: bool, signed: bool = False) -> str:
    if low is None or high is None:
        return "–"
    return f"{number(low, share=share, signed=signed)} to {number(high, share=share, signed=signed)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already: every caller escapes what it did not write itself."""
    if not rows:
        return ""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def metric_rows(metrics: Mapping[str, Any], *, share: bool) -> list[list[str]]:
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
            interval(m["low"], m["high"], share=share, signed=True),
            interval(m["normal_low"], m["normal_high"], share=share, signed=True), str(m["n"]),
        ])  # fmt: skip
    return rows


def win_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    return [
        [escape(name), number(m["win_rate"], share=True), interval(m["win_low"], m["win_high"], share=True),
         str(m["wins"]), str(m["ties"]), str(m["losses"]), str(m["n"])]
        for name, m in metrics.items() if "/" not in name or name.endswith("/all")
    ]  # fmt: skip


def gap_row(reward: str, judge: str, g: Mapping[str, Any]) -> list[str]:
    return [
        escape(reward), escape(judge),
        number(g["reward_gain"], signed=True), number(g["judge_gain"], share=True, signed=True),
        number(g["agreement"], share=True), interval(g["agreement_low"], g["agreement_high"], share=True),
        str(g["told_apart"]), str(g["table"][0][2]), str(g["n"]),
    ]  # fmt: skip


def models(report: Mapping[str, Any]) -> str:
    """Every model by every sampler, on the headline and on rewards."""
    compared = report.get("comparisons") or []
    if len(compared) < 2 or not report["metrics"]:
        return ""
    names = [name for name in report["metrics"] if name == report["headline"]["metric"] or "/" not in name]
    head = ["model", "sampler", *(cell for name in names for cell in (escape(name), "change", "interval"))]
    rows = []
    for row in compared:
        cells = [escape(row["model"]), escape(row["sampler"])]
        for name in names:
            m, share = row["metrics"][name], "/" in name
            cells += [number(m["tuned"], share=share), number(m["difference"], share=share, signed=True)]
            cells.append(interval(m["low"], m["high"], share=share, signed=True))
        rows.append(cells)
    orders = report.get("order") or {}
    said = "; ".join(f"{escape(s)}: {escape(' > '.join(names))}" for s, names in orders.items())
    alike = "Samplers agree on the order" if len({tuple(o) for o in orders.values()}) < 2 else "SAMPLERS DISAGREE"
    return table(head, rows) + (f'<p class="note">{alike} by the headline. {said}.</p>' if orders else "")


def categories(report: Mapping[str, Any]) -> str:
    rows = [
        [escape(category), escape(name), number(m["base"], share="/" in name), number(m["tuned"], share="/" in name),
         number(m["difference"], share="/" in name, signed=True),
         interval(m["low"], m["high"], share="/" in name, signed=True), str(m["n"])]
        for category, metrics in (report.get("categories") or {}).items()
        for name, m in metrics.items()
        if m["n"]
    ]  # fmt: skip
    return table(("category", "", "base", "tuned", "difference", "interval", "n"), rows)


def variety(report: Mapping[str, Any]) -> str:
    rows = [
        [escape(row["model"]), escape(row["sampler"]), number(d["base"]), number(d["tuned"]),
         number(d["difference"], signed=True), interval(d["low"], d["high"], share=False, signed=True), str(d["n"])]
        for row in report.get("comparisons") or []
        if (d := row.get("diversity"))
    ]  # fmt: skip
    return table(("model", "sampler", "base", "tuned", "difference", "interval", "prompts"), rows)


def distances(report: Mapping[str, Any]) -> str:
    rows = [
        [escape(row["model"]), escape(row["sampler"]), number(row["kid"]), number(row["cmmd"]),
         number(row["frechet"]) + (" (few)" if row["few_for_frechet"] else ""), str(row["pictures"])]
        for row in report.get("distances") or []
    ]  # fmt: skip
    return table(("model", "sampler", "KID", "CMMD", "Frechet", "pictures"), rows)
