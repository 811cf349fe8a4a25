"""The result of `bench` as a table and as a picture. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from mla_convert.core.errors import ResourceError
from mla_convert.core.units import human_bytes
from mla_convert.evaluate.speed.results import BenchResult, DecodeTiming, ModelTiming
from mla_convert.report.html.plots import BOTTOM, LEFT, RIGHT, TOP
from mla_convert.report.html.svg import Chart, decades, logarithmic
from mla_convert.report.table import Table

# A picture outside of the page brings the page's colours, light and dark, with it.
STYLE = """<style>
svg{font:13px system-ui,sans-serif;background:#fdfdfc}text{fill:#1c1f23}.tick,.axis{fill:#5f6871;font-size:12px}
.grid{stroke:#e3e5e6}.before{fill:#8b949c}.after{fill:#0072b2}path{fill:none!important;stroke-width:1.5}
path.before{stroke:#8b949c}path.after{stroke:#0072b2}
@media (prefers-color-scheme:dark){svg{background:#15181b}text{fill:#e7e9ea}.tick,.axis{fill:#9aa4ac}
.grid{stroke:#2b3035}.before{fill:#7d868e}.after{fill:#56b4e9}path.before{stroke:#7d868e}path.after{stroke:#56b4e9}}
</style>"""


def print_table(result: BenchResult, console: Console) -> None:
    """All points of all models; with two models, also the first one's tokens/s over the second one's."""
    console.print(f"{result.device}, copy {result.copy_bytes_per_second / 1e9:.0f} GB/s")
    for model in result.models:
        console.print(
            f"{model.name}: weights {human_bytes(model.weight_bytes)}, cache "
            f"{human_bytes(model.cache_bytes_per_token)} per token{_fixed(model)}, decoding on {model.attention}"
        )
    priced = result.price_per_hour is not None
    columns = ["model", "context", "batch", "cache", "tokens/s", "p50 ms", "p99 ms", "GB/s", "of copy"]
    rows = [_cells(model.name, point, priced) for model in result.models for point in model.points]
    table = Table([*columns, *(["per million"] if priced else [])], rows)
    console.print(table.rich(box=None, pad_edge=False))
    for model in result.models:
        for prompt in model.prompts:
            console.print(
                f"{model.name}: prompt of {prompt.tokens} tokens in {prompt.p50_ms:.1f} ms, "
                f"{prompt.tokens_per_second:.0f} tokens/s"
            )
        for words in model.left_out:
            console.print(f"{model.name}: left out: {words}")
    for words in ratios(result):
        console.print(words)


def _fixed(model: ModelTiming) -> str:
    """Of a hybrid model, the bytes that do not grow, and the share that does at each context."""
    fixed = model.fixed_bytes_per_sequence
    if not fixed:
        return ""
    contexts = sorted({point.context for point in model.points})
    sizes = [(context, context * model.cache_bytes_per_token) for context in contexts]
    shares = ", ".join(f"{size / (size + fixed):.1%} of the whole at {context}" for context, size in sizes)
    return f" ({shares or 'growing'}) and {human_bytes(fixed)} a sequence that do not grow"


def _cells(name: str, point: DecodeTiming, priced: bool) -> list[str]:
    batch = f"{point.batch} (largest)" if point.largest else str(point.batch)
    cost = [f"{point.cost_per_million:.3f}"] if priced else []
    return [name, str(point.context), batch, human_bytes(point.cache_bytes), f"{point.tokens_per_second:.0f}",
            f"{point.p50_ms:.2f}", f"{point.p99_ms:.2f}", f"{point.bytes_per_second / 1e9:.0f}",
            f"{point.share_of_copy:.0%}", *cost]  # fmt: skip


def ratios(result: BenchResult) -> Iterator[str]:
    """Tokens per second of the first model over the second's, at the contexts and batches that both have."""
    if len(result.models) != 2:
        return
    # The largest batches of two models differ in size: they meet under one name.
    first, second = (
        {(p.context, "the largest batch" if p.largest else f"batch {p.batch}"): p for p in model.points}
        for model in result.models
    )
    for where in [key for key in first if key in second]:
        ratio = first[where].tokens_per_second / second[where].tokens_per_second
        yield f"{where[0]} tokens, {where[1]}: {ratio:.2f} times the tokens/s of {result.models[1].name}"


def plot(result: BenchResult, width: int = 720) -> Chart | None:
    """Tokens per second against context, each model at its best batch, with logarithmic axes; None without any point."""
    lines = []
    for model in result.models:
        best: dict[int, float] = {}
        for point in model.points:
            best[point.context] = max(best.get(point.context, 0.0), point.tokens_per_second)
        if best:
            lines.append((model.name, "after" if model.converted else "before", sorted(best.items())))
    every = [point for _, _, points in lines for point in points]
    if not every:
        return None
    contexts, rates = sorted({c for c, _ in every}), [rate for _, rate in every]
    words = "; ".join(f"{name}: " + ", ".join(f"{c}: {r:.0f}" for c, r in points) for name, _, points in lines)
    chart = Chart(width, 300, "Tokens a second against context", f"{words}.")
    # Room at the ends for the circles, and above for the names of the lines.
    x = logarithmic((contexts[0] / 1.15, contexts[-1] * 1.15), (LEFT, width - RIGHT))
    y = logarithmic((min(rates) / 1.4, max(rates) * 1.6), (300 - BOTTOM, TOP))
    for rate in decades(min(rates) / 1.4, max(rates) * 1.6):
        chart.line(LEFT, y(rate), width - RIGHT, y(rate), "grid")
        chart.text(LEFT - 8, y(rate) + 4, f"{rate:g}", "tick", "end")
    for context in contexts:
        chart.text(x(context), 300 - BOTTOM + 18, str(context), "tick", "middle")
    for name, css, points in lines:
        chart.path([(x(c), y(r)) for c, r in points], css)
        for c, r in points:
            chart.add("circle", css, f"{c}: {r:.0f}", cx=x(c), cy=y(r), r=4)
        chart.text(x(points[0][0]), y(points[0][1]) - 10, name, "label")
    chart.text((LEFT + width - RIGHT) / 2, 294, "tokens of context", "axis", "middle")
    chart.text(14, (TOP + 300 - BOTTOM) / 2, "tokens a second", "axis", "middle", turn=True)
    return chart


def write_plot(result: BenchResult, path: Path) -> None:
    """Write the picture.

    Raises:
        ResourceError: it cannot be written.
    """
    chart = plot(result)
    if chart is None:
        return
    text = str(chart)
    # The style belongs inside the picture, behind its opening tag.
    cut = text.index(">") + 1
    try:
        path.write_text(text[:cut] + STYLE + text[cut:] + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}") from error
