"""The plots of a report. Each takes sections of the report and a width, and returns a chart, whose colours are CSS classes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from mla_convert.core.report_schema import CacheSection, Comparison, LayerEntry, PhaseEntry
from mla_convert.core.units import human_bytes
from mla_convert.report import format
from mla_convert.report.html.svg import Chart, decades, layer_ticks, linear, logarithmic, ticks

LEFT, RIGHT, TOP, BOTTOM = 74, 14, 14, 46
BAR = 30

# Steps of the closed form that keep a share of the energy: class of the colour, and words.
ENERGIES = {
    "rope_kept": ("rotary", "by decoupling RoPE"),
    "nope_kept": ("before", "by narrower heads"),
    "rank_kept": ("after", "by the low rank"),
}


def cache(section: CacheSection, heads: tuple[int, int] | None, width: int) -> Chart:
    """Numbers that a token leaves in a layer's cache, before and after, on one scale.

    Args:
        section: the cache in a report.
        heads: number and width of the original's key heads, if they are known.
        width: of the chart.
    """
    rank, rope = section.kv_lora_rank, section.qk_rope_head_dim
    before, after = section.numbers_per_token_per_layer.before, section.numbers_per_token_per_layer.after
    rows = [("before", [("keys", before // 2, "before"), ("values", before - before // 2, "before soft")], before),
            ("after", [("latent", rank, "after"), ("rotary key", rope, "rotary")], after)]  # fmt: skip
    chart = Chart(width, 172, "Numbers cached per token and layer",
                    f"Before: {before}. After: {after}, of which {rank} latent and {rope} rotary key.")  # fmt: skip
    x = linear((0, max(before, after)), (0, width - 58))
    for index, (name, parts, total) in enumerate(rows):
        y, start = 22 + index * 84, 0.0
        detail = f", {heads[0]} heads of {heads[1]}" if heads and name == "before" else ""
        chart.text(0, y - 8, f"{name}{detail}", "label")
        labels_end = 0.0
        for part, size, css in parts:
            left, right = x(start), x(start + size)
            chart.add(
                "rect", css, f"{part}: {size} numbers", x=left, y=y, width=max(right - left - 1, 0), height=BAR, rx=2
            )
            if size:
                # The label of a narrow part would cover the next one, which therefore moves to the right.
                at = max(left, labels_end)
                chart.text(at, y + BAR + 16, f"{part} {size}", "tick")
                labels_end = at + 7.2 * len(f"{part} {size}") + 10
            start += size
        chart.text(x(total) + 8, y + 20, str(total), "strong")
    return chart


def contexts(section: CacheSection, width: int) -> Chart:
    """Bytes of one sequence's cache at several contexts, before and after."""
    sizes = section.bytes_at_context
    largest = max(max(size.before, size.after) for size in sizes.values())
    words = "; ".join(f"{format.context(context)} tokens: {human_bytes(size.before)} to {human_bytes(size.after)}"
                      for context, size in sizes.items())  # fmt: skip
    chart = Chart(width, 44 * len(sizes) + 8, "KV cache of one sequence", f"{words}.")
    x = linear((0, largest), (52, width - 74))
    for index, (context, size) in enumerate(sizes.items()):
        y = 4 + 44 * index
        chart.text(0, y + 20, format.context(context), "label")
        for row, (side, amount) in enumerate((("before", size.before), ("after", size.after))):
            top = y + row * 16
            # At least a pixel wide: a bar of less could not be seen.
            chart.add("rect", side, f"{side}: {human_bytes(amount)}", x=52, y=top, width=max(x(amount) - 52, 1),
                      height=13, rx=2)  # fmt: skip
            chart.text(x(amount) + 6, top + 11, human_bytes(amount), "tick")
    return chart


def perplexity(evaluation: Comparison, width: int) -> Chart | None:
    """Perplexity before and after, with one standard error over windows to either side; None where one is not finite."""
    rows = []
    for side, measured in (("before", evaluation.before), ("after", evaluation.after)):
        if not math.isfinite(measured.value):
            return None
        error = measured.log_error if math.isfinite(measured.log_error) else 0.0
        rows.append((side, measured.value, measured.value * error, side))
    low, high = min(v - e for _, v, e, _ in rows), max(v + e for _, v, e, _ in rows)
    pad = (high - low or high) * 0.12
    marks = ticks(max(0.0, low - pad), high + pad, 4 if width < 500 else 6)
    words = "; ".join(f"{side} {value:.3f} ± {error:.3f}" for side, value, error, _ in rows)
    chart = Chart(width, 132, "Perplexity", f"{words}.")
    x = linear((max(0.0, low - pad), high + pad), (56, width - 20))
    for mark in marks:
        chart.line(x(mark), 6, x(mark), 92, "grid")
        chart.text(x(mark), 108, f"{mark:g}", "tick", "middle")
    for index, (side, value, error, css) in enumerate(rows):
        y = 30 + index * 40
        chart.text(0, y + 4, side, "label")
        chart.line(x(value - error), y, x(value + error), y, f"{css} thick")
        chart.add("circle", css, f"{side}: {value:.3f} ± {error:.3f}", cx=x(value), cy=y, r=6)
        chart.text(x(value), y - 11, f"{value:.3f}", "strong small", "middle")
    words = "perplexity ± one standard error over windows" if width >= 500 else "perplexity ± standard error"
    chart.text((56 + width - 20) / 2, 127, words, "axis", "middle")
    return chart


def numbers(layers: Sequence[LayerEntry]) -> list[int]:
    """The number of each layer in its model: in a hybrid, not all layers are converted."""
    return [index if layer.layer is None else layer.layer for index, layer in enumerate(layers)]


def _frame(chart: Chart, layers: Sequence[LayerEntry], height: int) -> tuple[Callable[[float], float], float]:
    """Draw the axis of layers below a plot; returns its scale over their places and the width of one layer."""
    x = linear((-0.5, len(layers) - 0.5), (LEFT, chart.width - RIGHT))
    for place in layer_ticks(len(layers), 7 if chart.width < 500 else 12):
        chart.text(x(place), height - BOTTOM + 18, str(numbers(layers)[place]), "tick", "middle")
    chart.text((LEFT + chart.width - RIGHT) / 2, height - 6, "layer", "axis", "middle")
    return x, (chart.width - LEFT - RIGHT) / len(layers)


def energies(layers: Sequence[LayerEntry]) -> list[str]:
    """The steps of `ENERGIES` that a report has: heads with fewer content dims are an option."""
    return [
        key
        for key in ENERGIES
        if key != "nope_kept" or any(layer.energy and math.isfinite(layer.energy.nope_kept) for layer in layers)
    ]


def energy(layers: Sequence[LayerEntry], width: int) -> Chart | None:
    """Shares kept by each step of `ENERGIES`. The share that is lost is on a logarithmic scale."""
    series = {
        key: [_lost(getattr(layer.energy, key)) if layer.energy else None for layer in layers]
        for key in energies(layers)
    }
    every = [lost for values in series.values() for lost in values if lost is not None]
    if not every:
        return None
    # A layer that loses nothing has no place on a logarithmic axis: it is drawn at its end.
    height, floor = 280, 1e-4
    low, high = max(min(every), floor) / 1.6, min(1.0, max(max(every), 2 * floor) * 1.6)
    worst = [
        f"{ENERGIES[key][1]}: worst {1 - max(filter(None, lost)):.2%}" for key, lost in series.items() if any(lost)
    ]
    chart = Chart(width, height, "Energy kept per layer", "; ".join(worst))
    x, step = _frame(chart, layers, height)
    # From top to bottom, so that layers that keep more are higher.
    y = logarithmic((low, high), (TOP + 4, height - BOTTOM))
    for lost in decades(low, high):
        chart.line(LEFT, y(lost), width - RIGHT, y(lost), "grid")
        chart.text(LEFT - 8, y(lost) + 4, _kept(lost), "tick", "end")
    for key, values in series.items():
        css, name = ENERGIES[key]
        points = [(index, lost) for index, lost in enumerate(values) if lost is not None]
        chart.path([(x(index), y(max(lost, low))) for index, lost in points], f"{css} thin")
        for index, lost in points:
            words = f"layer {numbers(layers)[index]}: {1 - lost:.3%} kept {name}"
            chart.add("circle", css, words, cx=x(index), cy=y(max(lost, low)), r=min(4, max(1.5, step / 3)))
    chart.text(11, (TOP + height - BOTTOM) / 2, "energy kept", "axis", "middle", turn=True)
    return chart


def _lost(kept: float) -> float | None:
    return 1 - kept if math.isfinite(kept) else None


def _kept(lost: float) -> str:
    digits = max(0, len(f"{lost:.6f}".rstrip("0")) - 4)
    return f"{1 - lost:.{digits}%}"


def errors(layers: Sequence[LayerEntry], closed_form: str, refined: str, width: int, axis: str) -> Chart | None:
    """A relative error of every layer in closed form and after refinement, joined by lines.

    Args:
        layers: the layers of a report.
        closed_form: entry of a layer with the error in closed form.
        refined: entry of a layer with the error after refinement.
        width: of the chart.
        axis: name of the error.
    """
    rows = [(index, _finite(getattr(layer, closed_form)), _finite(getattr(layer, refined)))
            for index, layer in enumerate(layers)]  # fmt: skip
    every = [value for _, *pair in rows for value in pair if value]
    if not every:
        return None
    height = 280
    low, high = min(every) / 1.5, max(every) * 1.5
    worst = max((pair[1] or pair[0] or 0, index) for index, *pair in rows)
    chart = Chart(width, height, f"{axis.capitalize()} per layer",
                    f"Largest after refinement: {worst[0]:.2g} in layer {numbers(layers)[worst[1]]}.")  # fmt: skip
    x, step = _frame(chart, layers, height)
    y = logarithmic((low, high), (height - BOTTOM, TOP))
    for mark in decades(low, high):
        chart.line(LEFT, y(mark), width - RIGHT, y(mark), "grid")
        chart.text(LEFT - 8, y(mark) + 4, power(mark), "tick", "end")
    radius = min(4.5, max(1.6, step / 3))
    for index, first, last in rows:
        number = numbers(layers)[index]
        both = first and last and abs(first / last - 1) > 1e-6
        if first and last and both:
            chart.line(x(index), y(first), x(index), y(last), "link")
            chart.add(
                "circle", "hollow", f"layer {number}, closed form: {first:.2e}", cx=x(index), cy=y(first), r=radius
            )
        if value := last or first:
            name = "refined" if both else "closed form"
            chart.add("circle", "after", f"layer {number}, {name}: {value:.2e}", cx=x(index), cy=y(value), r=radius)
    chart.text(11, (TOP + height - BOTTOM) / 2, axis, "axis", "middle", turn=True)
    return chart


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def power(value: float) -> str:
    """A mark of a logarithmic axis: 0.01, 1e-5."""
    return f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def planes(layers: Sequence[LayerEntry], frequencies: int, width: int) -> Chart | None:
    """Number of planes of each rotary frequency (rows) that stayed rotary in each layer (columns).

    Args:
        layers: the layers of a report.
        frequencies: number of the original's rotary frequencies.
        width: of the chart.
    """
    counts = [Counter(layer.plane_frequencies or []) for layer in layers]
    most = max((count for counter in counts for count in counter.values()), default=0)
    if not most:
        return None
    row = max(4.0, min(14.0, 380 / frequencies))
    top = 30
    height = round(top + row * frequencies + BOTTOM)
    total = sum(sum(counter.values()) for counter in counts)
    chart = Chart(width, height, "Planes that stayed rotary",
                    f"{total} planes in {len(layers)} layers, at most {most} at one frequency of one layer.")  # fmt: skip
    x, step = _frame(chart, layers, height)
    gap = 1.0 if min(step, row) > 5 else 0.4
    chart.add("rect", "empty", x=LEFT, y=top, width=width - LEFT - RIGHT, height=row * frequencies)
    for index, counter in enumerate(counts):
        left = x(index - 0.5)
        for frequency, count in sorted(counter.items()):
            words = f"layer {numbers(layers)[index]}, frequency {frequency}: {count} plane{'s' * (count > 1)}"
            # thousands of cells: titles would double the page, and on a phone no pointer hovers
            chart.add("rect", "plane", words if width >= 500 else "",
                       x=left + gap / 2, y=top + row * frequency + gap / 2, width=step - gap, height=row - gap,
                       fill_opacity=_shade(count, most))  # fmt: skip
    for mark in sorted({0, *ticks(0, frequencies - 1, 5)}):
        chart.text(LEFT - 8, top + row * (mark + 0.5) + 4, f"{mark:g}", "tick", "end")
    chart.text(11, top + row * frequencies / 2, "slow ← frequency → fast", "axis", "middle", turn=True)
    right = float(width - RIGHT)
    every = range(1, most + 1)
    # with many key heads the scale shows its ends and its middle
    for count in reversed(every if most <= (8 if width >= 500 else 4) else (1, (most + 1) // 2, most)):
        chart.text(right, 16, str(count), "tick", "end")
        right -= 7 * len(str(count)) + 4
        chart.add("rect", "plane", x=right - 12, y=5, width=12, height=12, fill_opacity=_shade(count, most))
        right -= 20
    chart.text(right - 2, 16, "planes kept", "tick", "end")
    return chart


def _shade(count: int, most: int) -> float:
    return 1.0 if most == 1 else 0.34 + 0.66 * (count - 1) / (most - 1)


def sizes(layers: Sequence[LayerEntry], width: int) -> Chart:
    """Rank and rotary dimensions of each layer, stacked."""
    pairs = [(layer.kv_lora_rank or 0, layer.qk_rope_head_dim or 0) for layer in layers]
    height, top = 220, max(rank + rope for rank, rope in pairs)
    chart = Chart(width, height, "Cache per layer",
                    f"From {min(map(sum, pairs))} to {top} numbers per token.")  # fmt: skip
    x, step = _frame(chart, layers, height)
    y = linear((0, top), (height - BOTTOM, TOP))
    for mark in ticks(0, top, 4):
        chart.line(LEFT, y(mark), width - RIGHT, y(mark), "grid")
        chart.text(LEFT - 8, y(mark) + 4, f"{mark:g}", "tick", "end")
    gap = 1.0 if step > 5 else 0.3
    for index, (rank, rope) in enumerate(pairs):
        for css, start, size, name in (("after", 0, rank, "latent"), ("rotary", rank, rope, "rotary key")):
            words = f"layer {numbers(layers)[index]}, {name}: {size}"
            chart.add("rect", css, words, x=x(index - 0.5) + gap / 2, y=y(start + size),
                       width=step - gap, height=max(y(start) - y(start + size), 0))  # fmt: skip
    chart.text(11, (TOP + height - BOTTOM) / 2, "numbers per token", "axis", "middle", turn=True)
    return chart


def phases(entries: Mapping[str, PhaseEntry], width: int) -> Chart:
    """Seconds of each phase, with its peak memory at the right."""
    largest = max(phase.seconds for phase in entries.values()) or 1.0
    words = "; ".join(f"{name}: {phase.seconds:.1f} s" for name, phase in entries.items())
    chart = Chart(width, 30 * len(entries) + 4, "Time and memory", f"{words}.")
    memory = [memory_words(phase, short=width < 500) for phase in entries.values()]
    # right of the bars there are seconds, a gap and memory; a character is at most 7 wide
    x = linear((0, largest), (66, width - 64 - 7 * max(map(len, memory))))
    for index, ((name, phase), used) in enumerate(zip(entries.items(), memory, strict=True)):
        y = 4 + 30 * index
        chart.text(0, y + 15, name, "label")
        chart.add("rect", "after soft", f"{name}: {phase['seconds']:.2f} s", x=66, y=y + 3,
                   width=max(x(phase.seconds) - 66, 1), height=16, rx=2)  # fmt: skip
        chart.text(x(phase.seconds) + 6, y + 15, f"{phase['seconds']:.1f} s", "tick")
        chart.text(width, y + 15, used, "tick", "end")
    return chart


def memory_words(phase: PhaseEntry, short: bool) -> str:
    """A phase's peak memory: that of the device where there is one, and of the host."""
    device, host = phase.peak_device_bytes, phase.peak_host_bytes
    parts = []
    if device:
        parts.append(human_bytes(device) + ("" if short else " on the card"))
    if host is not None and not (short and device):
        parts.append(human_bytes(host) + ("" if short or not device else " host"))
    return ", ".join(parts)


def curve(
    points: Sequence[tuple[float, float, float]],
    width: int,
    x_axis: str,
    y_axis: str,
    mark: tuple[float, float] | None = None,
) -> Chart | None:
    """A measured curve.

    Args:
        points: (x, y, standard error of y).
        width: of the chart.
        x_axis: name of x.
        y_axis: name of y.
        mark: place of this conversion on the curve.
    """
    points = sorted(points)
    if not points:
        return None
    height = 280
    everything = [*points, *([(*mark, 0.0)] if mark else [])]
    low, high = min(y - e for _, y, e in everything), max(y + e for _, y, e in everything)
    pad = (high - low or abs(high) or 1.0) * 0.08
    left, right = min(p[0] for p in everything), max(p[0] for p in everything)
    margin = (right - left or abs(right) or 1.0) * 0.05
    chart = Chart(width, height, f"{y_axis} over {x_axis}", "; ".join(f"{x:g}: {y:.4g}" for x, y, _ in points) + ".")
    x = linear((left - margin, right + margin), (LEFT, width - RIGHT))
    y = linear((low - pad, high + pad), (height - BOTTOM, TOP))
    for value in ticks(low - pad, high + pad, 5):
        chart.line(LEFT, y(value), width - RIGHT, y(value), "grid")
        chart.text(LEFT - 8, y(value) + 4, f"{value:g}", "tick", "end")
    for value in ticks(left, right, 4 if width < 500 else 7):
        chart.text(x(value), height - BOTTOM + 18, f"{value:g}", "tick", "middle")
    chart.path([(x(a), y(b)) for a, b, _ in points], "after thin")
    for a, b, error in points:
        if error:
            chart.line(x(a), y(b - error), x(a), y(b + error), "after thin")
        chart.add("circle", "after", f"{a:g}: {b:.4g}", cx=x(a), cy=y(b), r=4)
    if mark:
        chart.add("circle", "ring", "this conversion", cx=x(mark[0]), cy=y(mark[1]), r=8)
    chart.text((LEFT + width - RIGHT) / 2, height - 6, x_axis, "axis", "middle")
    chart.text(11, (TOP + height - BOTTOM) / 2, y_axis, "axis", "middle", turn=True)
    return chart
