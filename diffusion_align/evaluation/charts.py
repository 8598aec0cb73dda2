"""Curves and interval marks as inline SVG: no script, no font, colours are the page's, text goes through `escape`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .escape import escape

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


def _paths(points: list[tuple[float, float]]) -> str:
    """An SVG path through pixel positions, broken where y is nan."""
    parts, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            parts.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
    return " ".join(parts)


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

    def at_x(x: float) -> float:
        return LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in nice_ticks(low_y, high_y):
        y = at_y(tick)
        out.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{tick_label(tick)}</text>')
    for tick in nice_ticks(low_x, high_x, 6):
        out.append(f'<text class="tick mid" x="{at_x(tick):.1f}" y="{HEIGHT - 8}">{tick_label(tick)}</text>')
    out.append(f'<text class="tick end" x="{LEFT - 8}" y="{HEIGHT - 8}">{escape(x_label)}</text>')
    for number, (_, points) in enumerate(drawn):
        colour = f'style="--c:var(--c{number % COLOURS})"'
        band = [p for p in points if math.isfinite(p[1])]
        if any(high > low for _, _, low, high in band):
            upper = [(at_x(x), at_y(high)) for x, _, _, high in band]
            lower = [(at_x(x), at_y(low)) for x, _, low, _ in reversed(band)]
            out.append(f'<path class="band" {colour} d="{_paths(upper + lower)} Z"/>')
        line = [(at_x(x), at_y(mean)) for x, mean, _, _ in points]
        out.append(f'<path class="curve" {colour} d="{_paths(line)}"/>')
        if len(band) == 1:  # a line needs two points; one is drawn as a dot
            out.append(f'<circle class="dot" {colour} cx="{at_x(band[0][0]):.1f}" cy="{at_y(band[0][1]):.1f}" r="3"/>')
    return "".join([*out, "</svg>", _legend([label for label, _ in drawn])])


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    room = abs(low) / 2 or 0.5  # a constant curve sits in the middle
    return low - room, high + room


def _legend(labels: list[str]) -> str:
    if len(labels) < 2:
        return ""
    keys = [f'<span style="--c:var(--c{n % COLOURS})">{escape(label)}</span>' for n, label in enumerate(labels)]
    return f'<p class="legend">{"".join(keys)}</p>'


def interval_mark(low: float, value: float, high: float, reach: float) -> str:
    """A small mark of an interval on an axis from -reach to reach with zero in the middle; "" when it is not finite."""
    if not all(map(math.isfinite, (low, value, high))) or not reach > 0:
        return ""

    def at(x: float) -> float:
        return 60 + 56 * max(-1.0, min(1.0, x / reach))

    tone = "up" if low > 0 else "down" if high < 0 else "flat"
    return (
        f'<svg class="mark {tone}" viewBox="0 0 120 16" role="img" aria-label="interval">'
        '<line class="zero" x1="60" x2="60" y1="1" y2="15"/>'
        f'<line class="span" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="8" y2="8"/>'
        f'<circle cx="{at(value):.1f}" cy="8" r="3"/></svg>'
    )
