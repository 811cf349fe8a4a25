"""The chart of distance from the original against bytes of the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from mla_convert.report import format
from mla_convert.report.frontier import Point, Series
from mla_convert.report.html.plots import BOTTOM, LEFT, RIGHT, TOP, power
from mla_convert.report.html.svg import Chart, Scale, decades, linear, logarithmic, ticks

# Class of the colour and words of each series. Their marks differ in form too.
SERIES: dict[Series, tuple[str, str]] = {
    "original": ("flag", "the original with a quantised cache"),
    "rank": ("after", "latents, not quantised"),
    "quantised": ("packed", "quantised latents"),
}
HEIGHT = 340
# A KL of less is drawn at the end of the axis: it has no place on a logarithmic one.
FLOOR = 1e-6
# Widths of a character and a line of a label.
CHARACTER, LINE = 7.2, 14
RADIUS = 5


def frontier(points: Sequence[Point], width: int) -> Chart | None:
    """KL against bytes of the cache, one mark a point; None with fewer than two points.

    Args:
        points: of a report, an evaluation or a sweep.
        width: of the chart.
    """
    if len(points) < 2:
        return None
    values = [max(point.kl.value, FLOOR) for point in points]
    low, high = min(values) / 1.8, max(values) * 1.8
    right = max(0.05, math.ceil(20 * max(point.share for point in points) + 0.2) / 20)
    chart = Chart(width, HEIGHT, "KL divergence against bytes of the cache", _words(points))
    x = linear((0, 100 * right), (LEFT, width - RIGHT))
    y = logarithmic((low, high), (HEIGHT - BOTTOM, TOP))
    for mark in decades(low, high):
        chart.line(LEFT, y(mark), width - RIGHT, y(mark), "grid")
        chart.text(LEFT - 8, y(mark) + 4, power(mark), "tick", "end")
    for mark in ticks(0, 100 * right, 4 if width < 500 else 8):
        chart.text(x(mark), HEIGHT - BOTTOM + 18, f"{mark:g}", "tick", "middle")
    for name, (css, _) in SERIES.items():
        sizes = sorted((p.share, p.kl.value) for p in points if p.series == name and p.size)
        if len(sizes) > 1:
            chart.path([(x(100 * share), y(max(kl, FLOOR))) for share, kl in sizes], f"{css} thin")
    for point in points:
        _mark(chart, point, x, y)
    _labels(chart, points, x, y)
    chart.text((LEFT + width - RIGHT) / 2, HEIGHT - 6, "bytes of the cache, % of the original's", "axis", "middle")
    chart.text(11, (TOP + HEIGHT - BOTTOM) / 2, "KL(original ‖ model), nats", "axis", "middle", turn=True)
    return chart


def legend(points: Sequence[Point]) -> list[tuple[str, str]]:
    """The classes and words of the series that have points."""
    present = {point.series for point in points}
    return [entry for name, entry in SERIES.items() if name in present]


def _words(points: Sequence[Point]) -> str:
    named = ((point.name or SERIES[point.series][1], point) for point in points)
    return "; ".join(f"{name}, {p.share:.1%} of the bytes: {p.kl.value:.4g} nats" for name, p in named) + "."


def _mark(chart: Chart, point: Point, x: Scale, y: Scale) -> None:
    css = SERIES[point.series][0]
    kl, error = max(point.kl.value, FLOOR), point.kl.error
    at, height = x(100 * point.share), y(kl)
    words = f"{point.name or SERIES[point.series][1]}, {point.share:.1%} of the bytes: {format.with_error(point.kl, 4)} nats"
    if math.isfinite(error) and error:
        chart.line(at, y(kl + error), at, y(max(kl - error, kl / 2)), f"{css} thin")
    if point.series == "rank":
        chart.add("circle", css, words, cx=at, cy=height, r=RADIUS)
    else:
        chart.add("polygon", css, words, points=_corners(point.series, at, height))
    if point.current:
        chart.add("circle", "ring", "this model", cx=at, cy=height, r=RADIUS + 4)


def _corners(series: Series, x: float, y: float) -> str:
    """A diamond, or a triangle."""
    size = RADIUS + 1
    corners: list[tuple[float, float]] = [(0, -size), (size, 0), (0, size), (-size, 0)]
    if series == "quantised":
        corners = [(0, -size), (size, size * 0.8), (-size, size * 0.8)]
    return " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)


def _labels(chart: Chart, points: Sequence[Point], x: Scale, y: Scale) -> None:
    """The names beside the marks, each at the first place that is free; without one, the title of the mark has it."""
    marks = [(x(100 * point.share), y(max(point.kl.value, FLOOR))) for point in points]
    taken = [(px - 10, py - 10, px + 10, py + 10) for px, py in marks]
    # This model's name first, for it must have a place.
    for point, (px, py) in sorted(zip(points, marks, strict=True), key=lambda pair: not pair[0].current):
        wide, gap = CHARACTER * len(point.short), 15 if point.current else 12
        right, left = (px + gap, px + gap, "start"), (px - gap - wide, px - gap, "end")
        middle = (px - wide / 2, px, "middle")
        beside, above, below = (product(places, [up]) for places, up in
                                (((right, left), 0), ((middle, right, left), -18), ((middle, right, left), 18)))  # fmt: skip
        for (start, at, anchor), up in (*beside, *above, *below) if point.name and not point.size else ():
            box = (start, py + up - LINE / 2, start + wide, py + up + LINE / 2)
            inside = box[0] > LEFT and box[2] < chart.width and box[1] > TOP - 8 and box[3] < HEIGHT - BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                chart.text(at, py + up + 4, point.short, "tick", anchor)
                taken.append(box)
                break


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
