"""The pictures of a report: each takes figures and a width, and gives an SVG figure. They hold no colours, only classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from mla_convert.core.units import human_bytes
from mla_convert.report.html.svg import Figure, decades, layer_ticks, linear, logarithmic, ticks

LEFT, RIGHT, TOP, BOTTOM = 74, 14, 14, 46
BAR = 30


def cache(figures: dict[str, Any], heads: tuple[int, int] | None, width: int) -> Figure:
    """What a token leaves in each layer's cache, before and after, on one scale."""
    numbers, rank, rope = figures["numbers_per_token_per_layer"], figures["kv_lora_rank"], figures["qk_rope_head_dim"]
    before, after = numbers["before"], numbers["after"]
    rows = [("before", [("keys", before // 2, "before"), ("values", before - before // 2, "before soft")], before),
            ("after", [("latent", rank, "after"), ("rotary key", rope, "rotary")], after)]  # fmt: skip
    figure = Figure(width, 172, "Numbers cached per token and layer",
                    f"Before: {before}. After: {after}, of which {rank} latent and {rope} rotary key.")  # fmt: skip
    x = linear((0, max(before, after)), (0, width - 58))
    for index, (name, parts, total) in enumerate(rows):
        y, start = 22 + index * 84, 0
        detail = f", {heads[0]} heads of {heads[1]}" if heads and name == "before" else ""
        figure.text(0, y - 8, f"{name}{detail}", "label")
        labels_end = 0.0
        for part, size, css in parts:
            left, right = x(start), x(start + size)
            figure.add(
                "rect", css, f"{part}: {size} numbers", x=left, y=y, width=max(right - left - 1, 0), height=BAR, rx=2
            )
            if size:
                at = max(left, labels_end)
                figure.text(at, y + BAR + 16, f"{part} {size}", "tick")
                labels_end = at + 7.2 * len(f"{part} {size}") + 10
            start += size
        figure.text(x(total) + 8, y + 20, str(total), "strong")
    return figure


def contexts(figures: dict[str, Any], width: int) -> Figure:
    """Bytes of one sequence's cache at several contexts, before and after."""
    sizes = figures["bytes_at_context"]
    largest = max(max(size.values()) for size in sizes.values())
    words = "; ".join(f"{int(context) // 1024}k tokens: {human_bytes(size['before'])} to {human_bytes(size['after'])}"
                      for context, size in sizes.items())  # fmt: skip
    figure = Figure(width, 44 * len(sizes) + 8, "KV cache of one sequence", f"{words}.")
    x = linear((0, largest), (52, width - 74))
    for index, (context, size) in enumerate(sizes.items()):
        y = 4 + 44 * index
        figure.text(0, y + 20, f"{int(context) // 1024}k", "label")
        for row, (side, css) in enumerate((("before", "before"), ("after", "after"))):
            top = y + row * 16
            figure.add("rect", css, f"{side}: {human_bytes(size[side])}", x=52, y=top, width=max(x(size[side]) - 52, 1),
                       height=13, rx=2)  # fmt: skip
            figure.text(x(size[side]) + 6, top + 11, human_bytes(size[side]), "tick")
    return figure


def perplexity(evaluation: dict[str, Any], width: int) -> Figure | None:
    """Perplexity before and after, with one standard error over windows to either side."""
    rows = []
    for side, css in (("before", "before"), ("after", "after")):
        value, error = evaluation[side].get("value"), evaluation[side].get("log_error") or 0.0
        if value is None:
            return None
        rows.append((side, value, value * error, css))
    low, high = min(v - e for _, v, e, _ in rows), max(v + e for _, v, e, _ in rows)
    pad = (high - low or high) * 0.12
    marks = ticks(max(0.0, low - pad), high + pad, 4 if width < 500 else 6)
    words = "; ".join(f"{side} {value:.3f} ± {error:.3f}" for side, value, error, _ in rows)
    figure = Figure(width, 132, "Perplexity", f"{words}.")
    x = linear((max(0.0, low - pad), high + pad), (56, width - 20))
    for mark in marks:
        figure.line(x(mark), 6, x(mark), 92, "grid")
        figure.text(x(mark), 108, f"{mark:g}", "tick", "middle")
    for index, (side, value, error, css) in enumerate(rows):
        y = 30 + index * 40
        figure.text(0, y + 4, side, "label")
        figure.line(x(value - error), y, x(value + error), y, f"{css} thick")
        figure.add("circle", css, f"{side}: {value:.3f} ± {error:.3f}", cx=x(value), cy=y, r=6)
        figure.text(x(value), y - 11, f"{value:.3f}", "strong small", "middle")
    words = "perplexity ± one standard error over windows" if width >= 500 else "perplexity ± standard error"
    figure.text((56 + width - 20) / 2, 127, words, "axis", "middle")
    return figure


def _frame(figure: Figure, layers: int, height: int) -> tuple[Callable[[float], float], float]:
    """The axis of layers below a plot; gives its scale and the width of one layer."""
    x = linear((-0.5, layers - 0.5), (LEFT, figure.width - RIGHT))
    for layer in layer_ticks(layers, 7 if figure.width < 500 else 12):
        figure.text(x(layer), height - BOTTOM + 18, str(layer), "tick", "middle")
    figure.text((LEFT + figure.width - RIGHT) / 2, height - 6, "layer", "axis", "middle")
    return x, (figure.width - LEFT - RIGHT) / layers


def energy(layers: list[dict[str, Any]], width: int) -> Figure | None:
    """Shares kept by decoupling RoPE and by the low rank. Even steps are ten times less lost."""
    series = {key: [1 - layer["energy"][key] if layer["energy"].get(key) is not None else None for layer in layers]
              for key in ("rope_kept", "rank_kept")}  # fmt: skip
    found = [lost for values in series.values() for lost in values if lost is not None]
    if not found:
        return None
    height, floor = 280, 1e-4
    low, high = max(min(found), floor) / 1.6, min(1.0, max(max(found), 2 * floor) * 1.6)
    names = {"rope_kept": "by decoupling RoPE", "rank_kept": "by the low rank"}
    worst = [f"{names[key]}: worst {1 - max(filter(None, lost)):.2%}" for key, lost in series.items() if any(lost)]
    figure = Figure(width, height, "Energy kept per layer", "; ".join(worst))
    x, step = _frame(figure, len(layers), height)
    y = logarithmic((low, high), (TOP + 4, height - BOTTOM))
    for lost in decades(low, high):
        figure.line(LEFT, y(lost), width - RIGHT, y(lost), "grid")
        figure.text(LEFT - 8, y(lost) + 4, _kept(lost), "tick", "end")
    for (key, values), css in zip(series.items(), ("rotary", "after"), strict=True):
        points = [(index, lost) for index, lost in enumerate(values) if lost is not None]
        figure.path([(x(index), y(max(lost, low))) for index, lost in points], f"{css} thin")
        for index, lost in points:
            figure.add("circle", css, f"layer {index}: {1 - lost:.3%} kept {names[key]}", cx=x(index), cy=y(max(lost, low)),
                       r=min(4, max(1.5, step / 3)))  # fmt: skip
    figure.text(11, (TOP + height - BOTTOM) / 2, "energy kept", "axis", "middle", turn=True)
    return figure


def _kept(lost: float) -> str:
    digits = max(0, len(f"{lost:.6f}".rstrip("0")) - 4)
    return f"{1 - lost:.{digits}%}"


def errors(layers: list[dict[str, Any]], before: str, after: str, width: int, axis: str) -> Figure | None:
    """A relative error per layer in closed form and after refinement, joined."""
    rows = [(index, layer.get(before), layer.get(after)) for index, layer in enumerate(layers)]
    found = [value for _, *pair in rows for value in pair if value]
    if not found:
        return None
    height = 280
    low, high = min(found) / 1.5, max(found) * 1.5
    worst = max((pair[1] or pair[0] or 0, index) for index, *pair in rows)
    figure = Figure(width, height, f"{axis.capitalize()} per layer",
                    f"Largest after refinement: {worst[0]:.2g} in layer {worst[1]}.")  # fmt: skip
    x, step = _frame(figure, len(layers), height)
    y = logarithmic((low, high), (height - BOTTOM, TOP))
    for mark in decades(low, high):
        figure.line(LEFT, y(mark), width - RIGHT, y(mark), "grid")
        figure.text(LEFT - 8, y(mark) + 4, _power(mark), "tick", "end")
    radius = min(4.5, max(1.6, step / 3))
    for index, first, last in rows:
        both = bool(first and last) and abs(first / last - 1) > 1e-6
        if both:
            figure.line(x(index), y(first), x(index), y(last), "link")
            figure.add(
                "circle", "hollow", f"layer {index}, closed form: {first:.2e}", cx=x(index), cy=y(first), r=radius
            )
        if last or first:
            name = "refined" if both else "closed form"
            figure.add("circle", "after", f"layer {index}, {name}: {last or first:.2e}", cx=x(index), cy=y(last or first),
                       r=radius)  # fmt: skip
    figure.text(11, (TOP + height - BOTTOM) / 2, axis, "axis", "middle", turn=True)
    return figure


def _power(value: float) -> str:
    return f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def planes(layers: list[dict[str, Any]], frequencies: int, width: int) -> Figure | None:
    """Frequency × layer: how many planes of each rotary frequency stayed rotary."""
    counts = [Counter(layer.get("plane_frequencies") or []) for layer in layers]
    most = max((count for counter in counts for count in counter.values()), default=0)
    if not most:
        return None
    row = max(4.0, min(14.0, 380 / frequencies))
    top = 30
    height = round(top + row * frequencies + BOTTOM)
    total = sum(sum(counter.values()) for counter in counts)
    figure = Figure(width, height, "Planes that stayed rotary",
                    f"{total} planes in {len(layers)} layers, at most {most} at one frequency of one layer.")  # fmt: skip
    x, step = _frame(figure, len(layers), height)
    gap = 1.0 if min(step, row) > 5 else 0.4
    figure.add("rect", "empty", x=LEFT, y=top, width=width - LEFT - RIGHT, height=row * frequencies)
    for index, counter in enumerate(counts):
        left = x(index - 0.5)
        for frequency, count in sorted(counter.items()):
            words = f"layer {index}, frequency {frequency}: {count} plane{'s' * (count > 1)}"
            # on a phone nothing hovers, and there are thousands of cells
            figure.add("rect", "plane", words if width >= 500 else "",
                       x=left + gap / 2, y=top + row * frequency + gap / 2, width=step - gap, height=row - gap,
                       fill_opacity=_shade(count, most))  # fmt: skip
    for frequency in sorted({0, *ticks(0, frequencies - 1, 5)}):
        figure.text(LEFT - 8, top + row * (frequency + 0.5) + 4, f"{frequency:g}", "tick", "end")
    figure.text(11, top + row * frequencies / 2, "slow ← frequency → fast", "axis", "middle", turn=True)
    right = width - RIGHT
    every = range(1, most + 1)
    # with many kv heads the ends of the scale and its middle say enough
    for count in reversed(every if most <= (8 if width >= 500 else 4) else (1, (most + 1) // 2, most)):
        figure.text(right, 16, str(count), "tick", "end")
        right -= 7 * len(str(count)) + 4
        figure.add("rect", "plane", x=right - 12, y=5, width=12, height=12, fill_opacity=_shade(count, most))
        right -= 20
    figure.text(right - 2, 16, "planes kept", "tick", "end")
    return figure


def _shade(count: int, most: int) -> float:
    return 1.0 if most == 1 else 0.34 + 0.66 * (count - 1) / (most - 1)


def sizes(layers: list[dict[str, Any]], width: int) -> Figure:
    """Rank and rotary dims of each layer, stacked, where they differ."""
    pairs = [(layer.get("kv_lora_rank") or 0, layer.get("qk_rope_head_dim") or 0) for layer in layers]
    height, top = 220, max(rank + rope for rank, rope in pairs)
    figure = Figure(width, height, "Cache per layer",
                    f"From {min(map(sum, pairs))} to {top} numbers per token.")  # fmt: skip
    x, step = _frame(figure, len(layers), height)
    y = linear((0, top), (height - BOTTOM, TOP))
    for mark in ticks(0, top, 4):
        figure.line(LEFT, y(mark), width - RIGHT, y(mark), "grid")
        figure.text(LEFT - 8, y(mark) + 4, f"{mark:g}", "tick", "end")
    gap = 1.0 if step > 5 else 0.3
    for index, (rank, rope) in enumerate(pairs):
        for css, start, size, name in (("after", 0, rank, "latent"), ("rotary", rank, rope, "rotary key")):
            figure.add("rect", css, f"layer {index}, {name}: {size}", x=x(index - 0.5) + gap / 2, y=y(start + size),
                       width=step - gap, height=max(y(start) - y(start + size), 0))  # fmt: skip
    figure.text(11, (TOP + height - BOTTOM) / 2, "numbers per token", "axis", "middle", turn=True)
    return figure


def phases(found: dict[str, dict[str, float]], width: int) -> Figure:
    """Seconds of each phase; its peak memory beside it."""
    largest = max(phase["seconds"] for phase in found.values()) or 1.0
    words = "; ".join(f"{name}: {phase['seconds']:.1f} s" for name, phase in found.items())
    figure = Figure(width, 30 * len(found) + 4, "Time and memory", f"{words}.")
    memory = [memory_words(phase, short=width < 500) for phase in found.values()]
    # what is written right of the bars: seconds, a gap, memory; a character is at most 7 wide
    x = linear((0, largest), (66, width - 64 - 7 * max(map(len, memory))))
    for index, ((name, phase), used) in enumerate(zip(found.items(), memory, strict=True)):
        y = 4 + 30 * index
        figure.text(0, y + 15, name, "label")
        figure.add("rect", "after soft", f"{name}: {phase['seconds']:.2f} s", x=66, y=y + 3,
                   width=max(x(phase["seconds"]) - 66, 1), height=16, rx=2)  # fmt: skip
        figure.text(x(phase["seconds"]) + 6, y + 15, f"{phase['seconds']:.1f} s", "tick")
        figure.text(width, y + 15, used, "tick", "end")
    return figure


def memory_words(phase: dict[str, float], short: bool) -> str:
    """A phase's peak memory: the card's where there is one."""
    device, host = phase.get("peak_device_bytes"), phase.get("peak_host_bytes")
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
) -> Figure | None:
    """A measured curve: (x, y, standard error) in order of x; `mark` is this conversion's place on it."""
    points = sorted(points)
    if not points:
        return None
    height = 280
    everything = [*points, *([(*mark, 0.0)] if mark else [])]
    low, high = min(y - e for _, y, e in everything), max(y + e for _, y, e in everything)
    pad = (high - low or abs(high) or 1.0) * 0.08
    left, right = min(p[0] for p in everything), max(p[0] for p in everything)
    margin = (right - left or abs(right) or 1.0) * 0.05
    figure = Figure(width, height, f"{y_axis} over {x_axis}", "; ".join(f"{x:g}: {y:.4g}" for x, y, _ in points) + ".")
    x = linear((left - margin, right + margin), (LEFT, width - RIGHT))
    y = linear((low - pad, high + pad), (height - BOTTOM, TOP))
    for value in ticks(low - pad, high + pad, 5):
        figure.line(LEFT, y(value), width - RIGHT, y(value), "grid")
        figure.text(LEFT - 8, y(value) + 4, f"{value:g}", "tick", "end")
    for value in ticks(left, right, 4 if width < 500 else 7):
        figure.text(x(value), height - BOTTOM + 18, f"{value:g}", "tick", "middle")
    figure.path([(x(a), y(b)) for a, b, _ in points], "after thin")
    for a, b, error in points:
        if error:
            figure.line(x(a), y(b - error), x(a), y(b + error), "after thin")
        figure.add("circle", "after", f"{a:g}: {b:.4g}", cx=x(a), cy=y(b), r=4)
    if mark:
        figure.add("circle", "ring", "this conversion", cx=x(mark[0]), cy=y(mark[1]), r=8)
    figure.text((LEFT + width - RIGHT) / 2, height - 6, x_axis, "axis", "middle")
    figure.text(11, (TOP + height - BOTTOM) / 2, y_axis, "axis", "middle", turn=True)
    return figure
