"""Curves and interval marks as inline SVG: no script, no font; colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from .markup import render

Series = tuple[str, Sequence[float], Sequence[float]]  # label, x [P], y [P]; a y that is not finite is a gap

WIDTH, HEIGHT = 760, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 28
MAX_POINTS = 240  # columns of the plot that a curve can usefully have
COLOURS = 4  # --c0 .. --c3 in the page's style


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about this many."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / raw)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)] or [low]


def tick_label(value: float) -> str:
    """A tick in at most six significant digits, with a real minus sign; -0 is 0."""
    return f"{value + 0.0:.6g}".replace("-", "−")


def thin(xs: Sequence[float], ys: Sequence[float], limit: int = MAX_POINTS) -> list[tuple[float, float, float, float]]:
    """At most `limit` points (x, mean, lowest, highest), each of neighbouring finite values.

    Where none of the neighbours is finite the three are nan: a gap. Raises ValueError when x and y differ in length.
    """
    size = max(1, math.ceil(len(xs) / limit))
    points = []
    for start in range(0, len(xs), size):
        pairs = list(zip(xs[start : start + size], ys[start : start + size], strict=True))
        values = [y for _, y in pairs if math.isfinite(y)]
        x = sum(x for x, _ in pairs) / len(pairs)
        points.append((x, sum(values) / len(values), min(values), max(values)) if values else (x, *[math.nan] * 3))
    return points


def _path(points: Sequence[tuple[float, float]]) -> Markup:
    """An SVG path through pixel positions, broken where y is nan. Digits only, so it may be as long as it is."""
    steps, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            steps.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
    return Markup(" ".join(steps))


def line_chart(series: Sequence[Series], *, title: str, x_label: str = "step") -> str:
    """Curves over one pair of axes, "" when nothing is finite; long ones are averaged in columns, with a band."""
    thinned = [(label, [p for p in thin(xs, ys) if math.isfinite(p[0])]) for label, xs, ys in series]
    drawn = [(label, points) for label, points in thinned if any(math.isfinite(p[1]) for p in points)]
    if not drawn:
        return ""
    low_x, high_x = _range([p[0] for _, points in drawn for p in points])
    low_y, high_y = _range([y for _, points in drawn for p in points for y in p[2:] if math.isfinite(y)])
    pad = 0.04 * (high_y - low_y)
    low_y, high_y = low_y - pad, high_y + pad

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    curves = []
    for number, (label, points) in enumerate(drawn):
        finite = [p for p in points if math.isfinite(p[1])]
        edge = [at(p[0], p[3]) for p in finite] + [at(p[0], p[2]) for p in reversed(finite)]
        curves.append({
            "label": label,
            "colour": number % COLOURS,
            "line": _path([at(x, mean) for x, mean, _, _ in points]),
            "band": _path(edge) + " Z" if any(high > low for _, _, low, high in finite) else "",
            "dot": at(*finite[0][:2]) if len(finite) == 1 else None,  # a line needs two points
        })  # fmt: skip
    return render("line_chart.html.j2", {
        "title": title, "x_label": x_label, "curves": curves,
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT,
        "x_ticks": [(at(tick, low_y)[0], tick_label(tick)) for tick in nice_ticks(low_x, high_x, 6)],
        "y_ticks": [(at(low_x, tick)[1], tick_label(tick)) for tick in nice_ticks(low_y, high_y)],
    })  # fmt: skip


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    room = abs(low) / 2 or 0.5  # a constant curve sits in the middle
    return low - room, high + room


def interval_mark(low: float, value: float, high: float, reach: float) -> str:
    """A small mark of an interval on an axis from -reach to reach with zero in the middle; "" when it is not finite."""
    if not all(map(math.isfinite, (low, value, high))) or not reach > 0:
        return ""
    ends = {"low": low, "value": value, "high": high}
    at = {name: 60 + 56 * max(-1.0, min(1.0, x / reach)) for name, x in ends.items()}
    tone = "up" if low > 0 else "down" if high < 0 else "flat"
    return render("interval_mark.html.j2", {"tone": tone, **at})
