"""Charts: ticks and pixel positions by hand, well-formed SVG whatever the numbers."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from diffusion_align.evaluation.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    interval_mark,
    line_chart,
    nice_ticks,
    thin,
    tick_label,
)  # fmt: skip


def parse(markup):
    return ET.fromstring(f"<root>{markup}</root>")


def curve(markup, number=0):
    path = [p for p in parse(markup).iter("path") if p.get("class") == "curve"][number].get("d")
    return [(op, float(x), float(y)) for op, x, y in re.findall(r"([ML])(\S+) (\S+)", path)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (-3, 7, [-2, 0, 2, 4, 6]),
        (0.031, 0.034, [0.031, 0.0315, 0.032, 0.0325, 0.033, 0.0335, 0.034]),
        (1e6, 1e6 + 1, [1e6 + k / 5 for k in range(6)]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_tick_labels():
    assert [tick_label(v) for v in (0.30000000000000004, -0.0, -2, 1000, 1e-7)] == ["0.3", "0", "−2", "1000", "1e−07"]


def test_points_have_the_positions_of_the_axes():
    markup = line_chart([("a", [0, 5, 10], [0.0, 1.0, 0.5])], title="t")
    # The y range 0..1 has a margin of 4 % on both sides, so 0 is 0.04 / 1.08 of the plot's height above its bottom.
    plot = HEIGHT - TOP - BOTTOM
    x = [LEFT, LEFT + (WIDTH - LEFT - RIGHT) / 2, WIDTH - RIGHT]
    y = [TOP + plot * (1.04 - v) / 1.08 for v in (0.0, 1.0, 0.5)]
    assert [p[0] for p in curve(markup)] == ["M", "L", "L"]
    assert [p[1] for p in curve(markup)] == pytest.approx(x, abs=0.06)
    assert [p[2] for p in curve(markup)] == pytest.approx(y, abs=0.06)
    line = next(e for e in parse(markup).iter("line") if e.get("class") == "rule")  # the tick of 0
    assert float(line.get("y1")) == pytest.approx(y[0], abs=0.06)


def test_two_curves_share_their_axes_and_have_a_legend():
    markup = line_chart([("winner", [0, 1], [0.0, 1.0]), ("loser <b>", [0, 1], [1.0, 0.0])], title="t")
    first, second = curve(markup, 0), curve(markup, 1)
    assert first[0][2] == second[1][2] and first[1][2] == second[0][2]
    assert [e.text for e in parse(markup).iter("span")] == ["winner", "loser <b>"]
    assert "legend" not in line_chart([("alone", [0, 1], [0.0, 1.0])], title="t")


def test_a_gap_breaks_the_line_and_a_single_point_is_a_dot():
    markup = line_chart([("a", [0, 1, 2, 3, 4], [0.0, 1.0, math.nan, 0.5, math.inf])], title="t")
    assert [p[0] for p in curve(markup)] == ["M", "L", "M"]
    alone = line_chart([("a", [3], [2.0])], title="t")
    assert len(list(parse(alone).iter("circle"))) == 1


@pytest.mark.parametrize("ys", [[], [math.nan, math.inf], None])
def test_nothing_finite_is_no_chart(ys):
    assert line_chart([("a", list(range(len(ys or []))), ys or [])] if ys is not None else [], title="t") == ""


@pytest.mark.parametrize("ys", [[0.0, 0.0], [5.0, 5.0], [-3.0, -3.0], [1e-300, 1e-300], [1e300, -1e300]])
def test_flat_and_enormous_curves_stay_inside_the_frame(ys):
    for _, x, y in curve(line_chart([("a", [0, 1], ys)], title="t")):
        assert LEFT <= x <= WIDTH - RIGHT and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


def test_long_curves_are_averaged_in_columns_with_their_spread():
    xs = list(range(10_000))
    points = thin(xs, [float(x % 2) for x in xs])
    assert len(points) <= MAX_POINTS and all(p[1:] == (0.5, 0.0, 1.0) for p in points[:-1])
    assert points[0][0] == pytest.approx(20.5)  # columns of 42: the mean of 0..41
    markup = line_chart([("a", xs, [float(x % 2) for x in xs])], title="t")
    assert 'class="band"' in markup and len(markup) < 20_000
    assert 'class="band"' not in line_chart([("a", [0, 1], [0.0, 1.0])], title="t")
    with pytest.raises(ValueError):
        thin([1, 2], [1.0])


def test_titles_and_labels_are_escaped():
    markup = line_chart([("<script>", [0, 1], [0.0, 1.0]), ("b", [0], [0.0])], title='"><script>', x_label="<x>")
    assert "<script" not in markup and next(parse(markup).iter("svg")).get("aria-label") == '"><script>'


def test_interval_marks_by_hand():
    root = parse(interval_mark(0.1, 0.2, 0.4, 0.4))
    span, dot = [e for e in root.iter("line") if e.get("class") == "span"][0], next(root.iter("circle"))
    assert (float(span.get("x1")), float(span.get("x2")), float(dot.get("cx"))) == (74.0, 116.0, 88.0)
    assert "mark up" in interval_mark(0.1, 0.2, 0.4, 1) and "mark down" in interval_mark(-0.4, -0.2, -0.1, 1)
    assert "mark flat" in interval_mark(-0.1, 0.2, 0.4, 1)
    assert interval_mark(math.nan, 0.2, 0.4, 1) == "" and interval_mark(0.0, 0.0, 0.0, 0.0) == ""
