"""What `bench` measured, as a table and as a picture. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mla_convert.core.errors import ResourceError
from mla_convert.core.units import human_bytes
from mla_convert.report.html.plots import BOTTOM, LEFT, RIGHT, TOP
from mla_convert.report.html.svg import Figure, decades, logarithmic

# A picture that stands alone carries its colours: those of the report's page, by day and by night.
STYLE = """<style>
svg{font:13px system-ui,sans-serif;background:#fdfdfc}text{fill:#1c1f23}.tick,.axis{fill:#5f6871;font-size:12px}
.grid{stroke:#e3e5e6}.before{fill:#8b949c}.after{fill:#0072b2}path{fill:none!important;stroke-width:1.5}
path.before{stroke:#8b949c}path.after{stroke:#0072b2}
@media (prefers-color-scheme:dark){svg{background:#15181b}text{fill:#e7e9ea}.tick,.axis{fill:#9aa4ac}
.grid{stroke:#2b3035}.before{fill:#7d868e}.after{fill:#56b4e9}path.before{stroke:#7d868e}path.after{stroke:#56b4e9}}
</style>"""


def print_table(figures: dict[str, Any], console: Console) -> None:
    """All points of all models; with two models, how many times faster the second is at the first's contexts."""
    copy = figures["copy_bytes_per_second"]
    console.print(f"{figures['device']}, copy {copy / 1e9:.0f} GB/s")
    for model in figures["models"]:
        console.print(
            f"{model['name']}: weights {human_bytes(model['weight_bytes'])}, cache "
            f"{human_bytes(model['cache_bytes_per_token'])} per token, decoding on {model['attention']}"
        )
    priced = figures["price_per_hour"] is not None
    table = Table(box=None, pad_edge=False)
    for name in ("model", "context", "batch", "cache", "tokens/s", "p50 ms", "p99 ms", "GB/s", "of copy"):
        table.add_column(name, justify="left" if name == "model" else "right")
    if priced:
        table.add_column("per million", justify="right")
    for model in figures["models"]:
        for point in model["points"]:
            cost = [f"{point['cost_per_million']:.3f}"] if priced else []
            batch = f"{point['batch']} (largest)" if point["largest"] else str(point["batch"])
            table.add_row(model["name"], str(point["context"]), batch, human_bytes(point["cache_bytes"]),
                          f"{point['tokens_per_second']:.0f}", f"{point['p50_ms']:.2f}", f"{point['p99_ms']:.2f}",
                          f"{point['bytes_per_second'] / 1e9:.0f}", f"{point['share_of_copy']:.0%}", *cost)  # fmt: skip
    console.print(table)
    for model in figures["models"]:
        for prompt in model["prompts"]:
            console.print(
                f"{model['name']}: prompt of {prompt['tokens']} tokens in {prompt['p50_ms']:.1f} ms, "
                f"{prompt['tokens_per_second']:.0f} tokens/s"
            )
        for words in model["left_out"]:
            console.print(f"{model['name']}: left out: {words}")
    for words in ratios(figures):
        console.print(words)


def ratios(figures: dict[str, Any]) -> Iterator[str]:
    """Tokens a second of the first model over the second's, at the contexts and batches that both have."""
    if len(figures["models"]) != 2:
        return
    ours, theirs = (
        {(p["context"], "the largest batch" if p["largest"] else f"batch {p['batch']}"): p for p in model["points"]}
        for model in figures["models"]
    )
    for where in ours.keys() & theirs.keys() if len(ours) < 2 else [key for key in ours if key in theirs]:
        ratio = ours[where]["tokens_per_second"] / theirs[where]["tokens_per_second"]
        yield f"{where[0]} tokens, {where[1]}: {ratio:.2f} times the tokens/s of {figures['models'][1]['name']}"


def plot(figures: dict[str, Any], width: int = 720) -> Figure | None:
    """Tokens a second against context, each model at its best batch there; both axes by orders of magnitude."""
    lines = []
    for model in figures["models"]:
        best: dict[int, float] = {}
        for point in model["points"]:
            best[point["context"]] = max(best.get(point["context"], 0.0), point["tokens_per_second"])
        if best:
            lines.append((model["name"], "after" if model["converted"] else "before", sorted(best.items())))
    every = [point for _, _, points in lines for point in points]
    if not every:
        return None
    contexts, rates = sorted({c for c, _ in every}), [rate for _, rate in every]
    words = "; ".join(f"{name}: " + ", ".join(f"{c}: {r:.0f}" for c, r in points) for name, _, points in lines)
    figure = Figure(width, 300, "Tokens a second against context", f"{words}.")
    x = logarithmic((contexts[0] / 1.15, contexts[-1] * 1.15), (LEFT, width - RIGHT))
    y = logarithmic((min(rates) / 1.4, max(rates) * 1.6), (300 - BOTTOM, TOP))
    for rate in decades(min(rates) / 1.4, max(rates) * 1.6):
        figure.line(LEFT, y(rate), width - RIGHT, y(rate), "grid")
        figure.text(LEFT - 8, y(rate) + 4, f"{rate:g}", "tick", "end")
    for context in contexts:
        figure.text(x(context), 300 - BOTTOM + 18, str(context), "tick", "middle")
    for name, css, points in lines:
        figure.path([(x(c), y(r)) for c, r in points], css)
        for c, r in points:
            figure.add("circle", css, f"{c}: {r:.0f}", cx=x(c), cy=y(r), r=4)
        figure.text(x(points[0][0]), y(points[0][1]) - 10, name, "label")
    figure.text((LEFT + width - RIGHT) / 2, 294, "tokens of context", "axis", "middle")
    figure.text(14, (TOP + 300 - BOTTOM) / 2, "tokens a second", "axis", "middle", turn=True)
    return figure


def write_plot(figures: dict[str, Any], path: Path) -> None:
    """The picture as a file of its own.

    Raises:
        ResourceError: it cannot be written.
    """
    figure = plot(figures)
    if figure is None:
        return
    text = str(figure)
    cut = text.index(">") + 1
    try:
        path.write_text(text[:cut] + STYLE + text[cut:] + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}") from error
