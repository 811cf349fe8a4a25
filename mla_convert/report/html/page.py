"""report.html: the report as one page that needs neither network nor scripts. Imports no torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from mla_convert.core.errors import InputError, one_line
from mla_convert.core.files import write_file
from mla_convert.core.report_file import read_report
from mla_convert.core.report_schema import (
    CacheSection,
    HealSection,
    JsonObject,
    LayerEntry,
    Measurement,
    Report,
    SweepReport,
)
from mla_convert.core.units import human_bytes
from mla_convert.report import format, frontier
from mla_convert.report.html import plots
from mla_convert.report.html.frontier import frontier as frontier_chart
from mla_convert.report.html.frontier import legend
from mla_convert.report.html.svg import Chart
from mla_convert.report.quality_rows import (
    compared,
    heal_table,
    kinds_table,
    passkey_table,
    probe_conditions,
    probe_rows,
    suite_conditions,
)
from mla_convert.report.report import fixed_state_rows
from mla_convert.report.table import Table

WIDE, NARROW = 768, 343  # CSS pixels of a column on a desktop and on a phone of 375
ERRORS = (
    ("Error of the attention output", "output_error_closed_form", "output_error"),
    ("Error of the residual stream", "residual_error_closed_form", "residual_error"),
)
LAYER_COLUMNS = ("layer", "rank + rotary", "output error, closed form", "output error", "residual error")
ENERGY_COLUMNS = {"rope_kept": "RoPE kept", "nope_kept": "content kept", "rank_kept": "rank kept"}
TRAINED = {"all": "all weights", "attention": "the attention's weights", "lora": "adapters of the attention"}


def write_page(report: Report | Path, file: Path) -> None:
    """Write the page of a report, of a report.json or of its folder. A link of the file's name is replaced.

    Raises:
        InputError: there is no report, or no page can be made of it.
    """
    write_file(file, page_text(report if isinstance(report, Report) else read_report(report)))


def page_text(report: Report) -> str:
    """The page of a report. The report may come from a stranger: its numbers are checked, and all text is escaped.

    Raises:
        InputError: its values make no page.
    """
    try:
        return _environment().get_template("report.html.jinja").render(_context(report))
    # Every entry has its type, and yet a stranger's report may have no context, or no layer, to draw.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise InputError(
            f"report.json is not that of a conversion ({one_line(error)}): there is no page to make"
        ) from error


def write_sweep_page(content: JsonObject, file: Path) -> None:
    """Write the page of a sweep, from the content of its sweep.json."""
    sweep = SweepReport.model_validate(content)
    # A curve has no place for a ratio that is not finite; the table below it says so.
    shown = [point for point in sweep.points if math.isfinite(point.ratio)]
    chosen = next((point for point in shown if point.name == sweep.chosen), None)
    mark = (100 * chosen.share, chosen.ratio) if chosen else None
    curve = [(100 * point.share, point.ratio, _error(point.stderr)) for point in shown]
    found = frontier.points_of_sweep(sweep)
    columns = ("share", "numbers", "rank + rotary", "seed", "perplexity", "ratio", "held out", "took")
    rows = [
        (f"{point.share:.1%}", f"{point.numbers:g}", f"{point.rank} + {point.rope_dim}", str(point.seed),
         format.number(point.evaluation.after.value, 3, format.NOT_FINITE), format.ratio(point.evaluation),
         format.ratio(point.held_out), format.elapsed(point.seconds))
        for point in sweep.points
    ]  # fmt: skip
    text = (
        _environment()
        .get_template("sweep.html.jinja")
        .render(
            sweep=sweep,
            chosen=chosen,
            chart=_draw(
                lambda width: plots.curve(curve, width, "cache, % of the original's", "perplexity ratio", mark)
            ),
            points=Table(columns, rows, align="r" * len(columns)),
            distance=_draw(lambda width: frontier_chart(found, width)),
            legend=legend(found),
            caches=_caches(found),
        )
    )
    write_file(file, text)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mla_convert.report.html"),
        autoescape=True,
        # A misspelt name in a template is an error, not an empty place on the page.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = resources.files("mla_convert.report.html").joinpath("page.css").read_text(encoding="utf-8")
    environment.globals.update(css=css, calibration_text=format.calibration_text, suite_conditions=suite_conditions)
    environment.filters.update(is_finite=math.isfinite, ratio=format.ratio)
    return environment


def _cache_words(cache: CacheSection) -> str:
    """What a token leaves in the cache, before and after."""
    numbers, place = (
        cache.numbers_per_token_per_layer,
        "every layer" if cache.layers is None else "every layer with attention",
    )
    words = (
        f"A token used to leave {numbers.before:g} numbers in the cache of {place}, and now leaves {numbers.after:g}"
    )
    if cache.latent_cache:
        size = cache.bytes_per_number * numbers.after
        words += f"{format.latent_words(cache.latent_cache)}, packed in {size:g} bytes with their scales."
    else:
        words += f", of {cache.bytes_per_number:g} bytes each."
    if rows := fixed_state_rows(cache):
        (_, fixed, *_), (name, before, after, _) = rows
        words += (
            f" The states of the other layers, {fixed} a sequence, do not grow; {name}: {before} before, {after} after."
        )
    return words


def _caches(found: list[frontier.Point]) -> Table | None:
    """The points of a chart with names, where the original's quantised caches are among them."""
    return frontier.table(found) if any(point.series == "original" for point in found) else None


def _context(report: Report) -> dict[str, object]:
    """The names that the template uses."""
    evaluation = report.measured
    suite = evaluation.suite if evaluation else None
    probes, found = report.probes, frontier.points(report)
    return {
        "report": report,
        "distance": _draw(lambda width: frontier_chart(found, width)),
        "legend": legend(found),
        "caches": _caches(found),
        "verdict": frontier.verdict(found),
        "cache_words": _cache_words(report.cache),
        "evaluation": evaluation,
        "headline": _headline(report),
        "uneven": _is_uneven(report.layers),
        "charts": _charts(report),
        "layer_charts": _layer_charts(report.layers),
        "suite": suite,
        "kinds": suite and kinds_table(suite),
        "probes": probes and Table(("", "original", "converted"), probe_rows(probes)),
        "probe_conditions": probe_conditions(probes) if probes else [],
        "passkey": probes and passkey_table(probes),
        "heal_note": _heal_note(report.heal) if report.heal else "",
        "healed": _healed(report),
        "speed": _speed(report),
        "tables": _tables(report),
    }


def _headline(report: Report) -> list[tuple[str, str, str]]:
    """The values at the top of the page: name, value, and a line below it."""
    cache, evaluation = report.cache, report.measured
    per_token = f"{human_bytes(cache.bytes_per_token.before)} → {human_bytes(cache.bytes_per_token.after)} per token"
    values = [("KV cache", f"−{cache.share_saved:.1%}", per_token)]
    if evaluation is None:
        values.append(("perplexity", format.NOTHING, "not evaluated"))
    else:
        sides = (format.number(side.value, 3, format.NOT_FINITE) for side in (evaluation.before, evaluation.after))
        error = _error(evaluation.ratio_error)
        spread = f", ratio ± {error:.4f}" if error else ""
        values.append(("perplexity", format.times(evaluation.ratio, 3), " → ".join(sides) + spread))
        if (suite := evaluation.suite) and compared(suite) and suite.worst and suite.kl:
            kl = format.number(suite.kl.value, 4, format.NOT_FINITE)
            more = f"{suite.worst.kind}; KL {kl} nats over all kinds"
            values.append(("worst kind of text", format.times(suite.worst.ratio, 3), more))
    return [*values, ("took", format.elapsed(report.seconds), report.device)]


def _charts(report: Report) -> dict[str, str]:
    """The charts that stand alone, each empty where there is nothing to draw."""
    cache, source, evaluation = report.cache, report.source, report.measured
    heads = (source.key_value_heads, source.head_dim) if source.key_value_heads and source.head_dim else None
    frequencies = [frequency for layer in report.layers for frequency in layer.plane_frequencies or []]
    # Reports of version 0.1.0 do not state the shape of the original's attention.
    rows = max((source.head_dim or 0) // 2, max(frequencies, default=0) + 1)
    return {
        "cache": _draw(lambda width: plots.cache(cache, heads, width)),
        "contexts": _draw(lambda width: plots.contexts(cache, width)),
        "perplexity": _draw(lambda width: plots.perplexity(evaluation, width) if evaluation else None),
        "planes": _draw(lambda width: plots.planes(report.layers, rows, width) if frequencies else None),
        "sweep": _sweep(report),
        "heal": _heal(report.heal),
        "phases": _draw(lambda width: plots.phases(report.phases, width)),
    }


def _layer_charts(layers: list[LayerEntry]) -> list[tuple[str, str, tuple[tuple[str, str], ...]]]:
    """The charts over layers: title, chart, and the meaning of its colours."""
    charts: list[tuple[str, str, tuple[tuple[str, str], ...]]] = []
    if _is_uneven(layers):
        key = (("after", "latent"), ("rotary", "rotary key"))
        charts.append(("Numbers cached", _draw(lambda width: plots.sizes(layers, width)), key))
    steps = tuple((css, f"kept {name}") for css, name in map(plots.ENERGIES.__getitem__, plots.energies(layers)))
    charts.append(("Energy kept", _draw(lambda width: plots.energy(layers, width)), steps))
    for title, first, last in ERRORS:
        pairs = [(_error(getattr(layer, first)), _error(getattr(layer, last))) for layer in layers]
        refined = any(before and after and before != after for before, after in pairs)
        key = (("hollow", "closed form"), ("after", "after refinement"))
        chart = _draw(functools.partial(_errors, layers, first, last))
        charts.append((title, chart, key if refined else ()))
    return [entry for entry in charts if entry[1]]


def _errors(layers: list[LayerEntry], first: str, last: str, width: int) -> Chart | None:
    return plots.errors(layers, first, last, width, "relative error")


def _is_uneven(layers: list[LayerEntry]) -> bool:
    return len({(layer.kv_lora_rank, layer.qk_rope_head_dim) for layer in layers}) > 1


def _sweep(report: Report) -> str:
    points = [(100 * entry.share, entry.ratio, _error(entry.stderr))
              for entry in report.sweep or [] if math.isfinite(entry.ratio)]  # fmt: skip
    ratio = report.perplexity_ratio
    mark = (100 * (1 - report.cache.share_saved), ratio) if ratio is not None and math.isfinite(ratio) else None
    return _draw(lambda width: plots.curve(points, width, "cache, % of the original's", "perplexity ratio", mark))


def _token_unit(heal: HealSection) -> tuple[float, str]:
    """Tokens in a unit of the healing curve, and the unit's name."""
    most = max((point.tokens for point in heal.curve or []), default=0)
    return (1e6, "million") if most >= 1e6 else (1e3, "thousand")


def _heal(heal: HealSection | None) -> str:
    if heal is None:
        return ""
    size, unit = _token_unit(heal)
    points = [(point.tokens / size, point.kl, 0.0) for point in heal.curve or [] if math.isfinite(point.kl)]
    x_axis = f"{unit} tokens of distillation"
    return _draw(lambda width: plots.curve(points, width, x_axis, "held-out KL divergence, nats"))


def _kept(heal: HealSection, tokens: str) -> str:
    """Which weights of the run were kept."""
    if heal.share is None or heal.share == 1:
        return f"the state with the least loss there, after {tokens}, was kept"
    return (
        f"the loss was least after {tokens}, and as low at {heal.share:.0%} of the way from the conversion to there: those "
        f"weights were kept, as they forget less"
    )


def _heal_note(heal: HealSection) -> str:
    """The healing run in sentences; in short where only its curve is known."""
    if heal.before is None or heal.tokens is None or heal.seconds is None or heal.best_tokens is None:
        return "KL divergence from the original while the model learned from it."
    size, unit = _token_unit(heal)
    settings = heal.settings
    trained, share, weight = (
        (settings.train, settings.self_share, settings.ce_weight) if settings else (None, None, None)
    )
    text = f"{heal.text}, and on {share:.0%} of text that the original wrote itself" if share else heal.text
    adapted = (
        f" The text's cross-entropy counted as well, with weight {weight:g}: part of the perplexity is adaptation to it."
        if weight
        else ""
    )
    return (
        f"After the conversion, {TRAINED.get(trained or '', 'weights')} learned the next-token distribution of {heal.against} "
        f"on {text}: {heal.tokens / size:.3g} {unit} tokens in {format.elapsed(heal.seconds)} on "
        f"{heal.device}. The curve is measured on the end of that text, which was not trained on; "
        f"{_kept(heal, f'{heal.best_tokens / size:.3g} {unit} tokens')}.{adapted}"
        + (f" Stopped early: {heal.stopped}." if heal.stopped else "")
    )


def _healed(report: Report) -> Table | None:
    if report.heal is None or report.heal.before is None:
        return None
    return heal_table(report.heal.before, Measurement(evaluation=report.evaluation, probes=report.probes))


def _speed(report: Report) -> Table | None:
    entries = report.bench and report.bench.decode
    if not entries:
        return None
    rows = [(f"{entry.context:,}", f"{entry.before:,.0f}", f"{entry.after:,.0f}", f"×{entry.after / entry.before:.2f}")
            for entry in entries]  # fmt: skip
    return Table(("context", "before", "after", ""), rows, align="rrrr")


def _tables(report: Report) -> list[tuple[str, Table]]:
    """The tables under Details."""
    energies = plots.energies(report.layers)
    columns = (*LAYER_COLUMNS[:2], *(ENERGY_COLUMNS[key] for key in energies), *LAYER_COLUMNS[2:])
    layers = [
        (
            str(number),
            f"{layer.kv_lora_rank} + {layer.qk_rope_head_dim}",
            *(format.percent(getattr(layer.energy, key) if layer.energy else None, 3) for key in energies),
            *map(format.scientific, (layer.output_error_closed_form, layer.output_error, layer.residual_error)),
        )
        for number, layer in zip(plots.numbers(report.layers), report.layers, strict=True)
    ]
    tables = [("Every layer in figures", Table(columns, layers, align="r" * len(columns)))]
    entries: tuple[tuple[str, dict[str, Any]], ...] = (
        ("Settings", report.settings), ("Versions", report.versions), ("Checksums", report.checksums),
    )  # fmt: skip
    for name, content in entries:
        rows = [(key, format.NOTHING if value is None else str(value)) for key, value in content.items()]
        tables.append((name, Table((), rows, align="lc")))
    return tables


def _error(value: float) -> float:
    """An error, or 0 where there is none that is finite."""
    return value if math.isfinite(value) else 0.0


def _draw(plot: Callable[[int], Chart | None]) -> str:
    """A chart at both widths, of which CSS shows the one that fits; empty where there is nothing to draw."""
    charts = [(css, plot(width)) for css, width in (("wide", WIDE), ("narrow", NARROW))]
    if any(chart is None for _, chart in charts):
        return ""
    drawn = "".join(str(chart).replace("<svg ", f'<svg class="{css}" ', 1) for css, chart in charts)
    return f"<figure>{drawn}</figure>"
