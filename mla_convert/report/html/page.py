"""report.html: the figures of report.json as one page that needs nothing else, neither network nor scripts."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from mla_convert.core.errors import InputError, one_line
from mla_convert.core.files import write_file
from mla_convert.core.report_file import calibration_words, is_evaluated, look_up, read_report
from mla_convert.core.report_schema import check_report
from mla_convert.core.units import human_bytes
from mla_convert.evaluate.quality import kinds
from mla_convert.report import quality_rows
from mla_convert.report.html import plots
from mla_convert.report.html.svg import Figure
from mla_convert.report.quality_rows import ratio_error, ratio_words

WIDE, NARROW = 768, 343  # CSS pixels of a column on a desktop and on a phone of 375


def write_page(report: dict[str, Any] | Path, file: Path) -> None:
    """Make the page of a report (its content, a report.json or its folder) and write it. A link of that name is replaced.

    Raises:
        InputError: no report, or one that lacks what every conversion reports.
    """
    write_file(file, page_text(report if isinstance(report, dict) else read_report(report)))


def page_text(report: dict[str, Any]) -> str:
    """The page of a report that may hold anything.

    Raises:
        InputError: it lacks what every conversion reports, or holds something else there.
    """
    check_report(report)
    try:
        return page(report)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise InputError(
            f"report.json is not that of a conversion ({one_line(error)}): there is no page to make"
        ) from error


def page(report: dict[str, Any]) -> str:
    """The page as text."""
    parts = [_head(report), _cache(report), _perplexity(report), _kinds(report), _beyond(report), _planes(report), _layers(report),
             _sweep(report), _heal(report), _bench(report), _time(report), _details(report)]  # fmt: skip
    return _document(f"{report['source']['name']} with Multi-head Latent Attention", parts)


def write_sweep_page(content: dict[str, Any], file: Path) -> None:
    """The page of a sweep, from the content of its sweep.json."""
    points = content["points"]
    shown = [entry for entry in points if entry["ratio"] is not None]
    chosen = next((entry for entry in shown if entry["name"] == content["chosen"]), None)
    mark = (100 * chosen["share"], chosen["ratio"]) if chosen else None
    curve = [(100 * entry["share"], entry["ratio"], entry["stderr"] or 0.0) for entry in shown]
    drawn = _draw(lambda width: plots.curve(curve, width, "cache, % of the original's", "perplexity ratio", mark))
    evaluation, held_out = points[0]["evaluation"], points[0]["held_out"]
    words = escape(
        f"Perplexity over the original's on {evaluation['text']}: {evaluation['protocol']}; ± is one standard error over "
        f"windows. Held out: the same on {held_out['text']}, {held_out['protocol']}, by which a size is chosen. "
        f"Calibrated on {calibration_words(points[0]['calibration'])}."
    )
    if chosen:
        words += escape(f" The ring is the smallest cache within ×{content['max_ppl_ratio']:g} on the held-out text.")
    columns = ["share", "numbers", "rank + rotary", "seed", "perplexity", "ratio", "held out", "took"]
    rows = [
        [f"{entry['share']:.1%}", f"{entry['numbers']:g}", f"{entry['rank']} + {entry['rope_dim']}", str(entry["seed"]),
         _figure(entry["evaluation"]["after"]["value"]), _ratio(entry["evaluation"]), _ratio(entry["held_out"]),
         _duration(entry["seconds"])]
        for entry in points
    ]  # fmt: skip
    head = (
        f"<header><h1>{escape(content['source'])}</h1><p class='sub'>at {len(points)} sizes of its cache</p></header>"
    )
    parts = [head, _section("The frontier", words, drawn), _table(columns, rows, "n" * len(columns))]
    write_file(file, _document(f"{content['source']}: quality and cache size", parts))


def _document(title: str, parts: list[str]) -> str:
    css = resources.files("mla_convert.report.html").joinpath("page.css").read_text(encoding="utf-8")
    title = escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # without one a browser asks the server for /favicon.ico
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>\n{css}</style>\n</head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _head(report: dict[str, Any]) -> str:
    cache, evaluation = report["cache"], report["evaluation"]
    per_token = {side: human_bytes(size) for side, size in cache["bytes_per_token"].items()}
    error = ratio_error(evaluation)
    spread = f", ratio ± {error:.4f}" if error else ""
    measured = "not evaluated"
    if is_evaluated(evaluation):
        before, after = (evaluation[side]["value"] for side in ("before", "after"))
        measured = f"{_figure(before)} → {_figure(after)}{spread}"
    found = [
        ("KV cache", f"−{cache['share_saved']:.1%}", escape(f"{per_token['before']} → {per_token['after']} per token")),
        ("perplexity", _figure(evaluation["ratio"], "×{:.3f}"), escape(measured)),
        ("took", _duration(report["seconds"]), escape(report["device"])),
    ]
    if kinds.compared(suite := evaluation.get("suite")):
        worst = suite["worst"]
        more = f"{escape(worst['kind'])}; KL {_figure(suite['kl']['value'], '{:.4f}')} nats over all kinds"
        found.insert(2, ("worst kind of text", _figure(worst["ratio"], "×{:.3f}"), more))
    cells = "".join(
        f"<div><dt>{what}</dt><dd>{escape(figure)}</dd><small>{more}</small></div>" for what, figure, more in found
    )
    revision = report["source"].get("revision")
    at = f" at revision <code>{escape(revision[:12])}</code>" if revision else ""
    sizes = {(layer.get("kv_lora_rank"), layer.get("qk_rope_head_dim")) for layer in report["layers"]}
    spread = ", averaged over layers" if len(sizes) > 1 else ""
    rank, rope = (escape(str(cache[key])) for key in ("kv_lora_rank", "qk_rope_head_dim"))
    return (
        f"<header><h1>{escape(report['source']['name'])}</h1>"
        f'<p class="sub">converted to Multi-head Latent Attention{at}: a latent of {rank} numbers and a '
        f'rotary key of {rope}{spread}</p><dl class="figures">{cells}</dl></header>'
    )


def _cache(report: dict[str, Any]) -> str:
    cache = report["cache"]
    heads = look_up(report, "source.key_value_heads"), look_up(report, "source.head_dim")
    known = heads if all(heads) else None
    words = escape(
        f"A token used to leave {cache['numbers_per_token_per_layer']['before']} numbers in the cache of every layer, and now "
        f"leaves {cache['numbers_per_token_per_layer']['after']}, of {cache['bytes_per_number']} bytes each."
    )
    first = _draw(lambda width: plots.cache(cache, known, width))
    second = _draw(lambda width: plots.contexts(cache, width))
    return _section("The cache", words, first) + f"<h3>One sequence, by context</h3>{second}"


def _perplexity(report: dict[str, Any]) -> str:
    evaluation = report["evaluation"]
    if not is_evaluated(evaluation):
        words = f"Not evaluated: it was converted with --eval none. Calibrated on {calibration_words(report['calibration'])}."
        return _section("Perplexity", escape(words), "")
    words = escape(
        f"On {evaluation['text']}: {evaluation['protocol']}. Lower is better. Most of the error bars is how much windows of "
        f"text differ, which both models share: the ratio is taken on the same ones, and its ± is what is "
        f"left. Calibrated on {calibration_words(report['calibration'])}."
    )
    if (held_out := evaluation.get("held_out")) and held_out["ratio"] is not None:
        words += escape(
            f" On {held_out['text']}, which is there to choose settings by, the ratio is {ratio_words(held_out)}."
        )
    if evaluation["ratio"] is None:
        return _section("Perplexity", words + " One of them is not finite.", "")
    return _section("Perplexity", words, _draw(lambda width: plots.perplexity(evaluation, width)))


def _kinds(report: dict[str, Any]) -> str:
    suite = report["evaluation"].get("suite")
    if not suite:
        return ""
    found = _table(list(kinds.COLUMNS), [list(row) for row in kinds.rows(suite)], "t" + "n" * (len(kinds.COLUMNS) - 1))
    return _section("Kinds of text", escape(kinds.conditions(suite)), found)


def _beyond(report: dict[str, Any]) -> str:
    found = report.get("beyond")
    if not found:
        return ""
    content = _table(["", "original", "converted"], [list(row) for row in quality_rows.rows(found)], "tnn")
    if cells := quality_rows.passkey_rows(found):
        columns = ["length", "depth", "found, original", "converted", "log-probability, original", "converted"]
        inside = _table(columns, cells, "nnnnnn")
        content += f"<details><summary>Pass keys by length and depth</summary>{inside}</details>"
    words = " ".join(quality_rows.conditions(found)) + " ± is one standard error."
    return _section("Beyond perplexity", escape(words), content)


def _planes(report: dict[str, Any]) -> str:
    layers = report["layers"]
    found = [frequency for layer in layers for frequency in layer.get("plane_frequencies") or []]
    if not found:
        return ""
    head_dim = look_up(report, "source.head_dim")
    frequencies = max(head_dim // 2 if head_dim else 0, max(found) + 1)
    words = (
        "Every row is a rotary frequency of the original, every column a layer. A plane is one complex direction across the "
        "key heads; those that would lose most without their rotation kept it, the others live in the latent."
    )
    return _section("Which planes stayed rotary", words, _draw(lambda width: plots.planes(layers, frequencies, width)))


def _layers(report: dict[str, Any]) -> str:
    layers = report["layers"]
    parts = []
    if len({(layer.get("kv_lora_rank"), layer.get("qk_rope_head_dim")) for layer in layers}) > 1:
        key = _key(("after", "latent"), ("rotary", "rotary key"))
        parts.append(f"<h3>Numbers cached</h3>{_draw(lambda width: plots.sizes(layers, width))}{key}")
    if drawn := _draw(lambda width: plots.energy(layers, width)):
        key = _key(("rotary", "kept by decoupling RoPE"), ("after", "kept by the low rank"))
        parts.append(f"<h3>Energy kept</h3>{drawn}{key}")
    for name, first, last, axis in (
        ("Error of the attention output", "output_error_closed_form", "output_error", "relative error"),
        ("Error of the residual stream", "residual_error_closed_form", "residual_error", "relative error"),
    ):
        if drawn := _draw(lambda width, f=first, a=last, axis=axis: plots.errors(layers, f, a, width, axis)):
            refined = any(layer.get(first) and layer.get(last) and layer[first] != layer[last] for layer in layers)
            key = _key(("hollow", "closed form"), ("after", "after refinement")) if refined else ""
            parts.append(f"<h3>{name}</h3>{drawn}{key}")
    words = (
        "Energy is the share that the closed form expects to keep. Errors are measured on held-out windows, relative to the "
        "original; refinement aims at the residual stream, where a layer also mends what earlier ones lost. All scales are "
        "logarithmic."
    )
    return _section("Layer by layer", words, "".join(parts)) if parts else ""


def _sweep(report: dict[str, Any]) -> str:
    points = [(100 * entry["share"], entry["ratio"], entry.get("stderr") or 0.0)
              for entry in report.get("sweep") or [] if entry.get("ratio") is not None]  # fmt: skip
    here, ratio = 100 * (1 - report["cache"]["share_saved"]), report["evaluation"]["ratio"]
    mark = (here, ratio) if ratio is not None else None
    drawn = _draw(lambda width: plots.curve(points, width, "cache, % of the original's", "perplexity ratio", mark))
    words = (
        "Perplexity over the original's at other cache sizes, converted in the same way. The ring is this conversion."
    )
    return _section("The frontier", words, drawn) if drawn else ""


def _heal(report: dict[str, Any]) -> str:
    record = report.get("heal") or {}
    entries = record.get("curve") or []
    size, unit = (
        (1e6, "million") if max((entry["tokens"] for entry in entries), default=0) >= 1e6 else (1e3, "thousand")
    )
    points = [(entry["tokens"] / size, entry["kl"], 0.0) for entry in entries if entry.get("kl") is not None]
    drawn = _draw(
        lambda width: plots.curve(points, width, f"{unit} tokens of distillation", "held-out KL divergence, nats")
    )
    if not drawn:
        return ""
    if "before" not in record:  # a curve alone
        return _section("Healing", "KL divergence from the original while the model learned from it.", drawn)
    trained = {"all": "all weights", "attention": "the attention's weights", "lora": "adapters of the attention"}
    kind, stopped = look_up(record, "settings.train"), record.get("stopped")
    share = look_up(record, "settings.self_share")
    text = (
        f"{record.get('text')}, and on {share:.0%} of text that the original wrote itself"
        if share
        else record.get("text")
    )
    weight = look_up(record, "settings.ce_weight")
    adapted = (
        f" The text's cross-entropy counted as well, with weight {weight:g}: part of the perplexity is adaptation to it."
        if weight
        else ""
    )
    words = escape(
        f"After the conversion, {trained.get(kind, 'weights')} learned the next-token distribution of {record.get('against')} "
        f"on {text}: {record['tokens'] / size:.3g} {unit} tokens in {_duration(record['seconds'])} on "
        f"{record.get('device')}. The curve is measured on the end of that text, which was not trained on; the state with the "
        f"least loss there, after {record['best_tokens'] / size:.3g} {unit} tokens, was kept.{adapted}"
        + (f" Stopped early: {stopped}." if stopped else "")
    )  # fmt: skip
    rows = [list(row) for row in quality_rows.heal_rows(record["before"], report)]
    return _section("Healing", words, drawn + _table(["", "not healed", "healed"], rows, "tnn"))


def _bench(report: dict[str, Any]) -> str:
    rows = look_up(report, "bench.decode") or []
    if not rows:
        return ""
    cells = [[f"{row['context']:,}", f"{row['before']:,.0f}", f"{row['after']:,.0f}", f"×{row['after'] / row['before']:.2f}"]
             for row in rows]  # fmt: skip
    words = escape(f"Tokens per second while decoding, on {look_up(report, 'bench.device') or report['device']}.")
    return _section("Speed", words, _table(["context", "before", "after", ""], cells, "nnnn"))


def _time(report: dict[str, Any]) -> str:
    device = escape(report["device"])
    words = f"On {device}. Memory is each phase's peak; of the host, what is above the interpreter and its libraries."
    return _section("Time and memory", words, _draw(lambda width: plots.phases(report["phases"], width)))


def _details(report: dict[str, Any]) -> str:
    layers = [
        [str(layer.get("layer", index)), f"{layer.get('kv_lora_rank')} + {layer.get('qk_rope_head_dim')}",
         _share(look_up(layer, "energy.rope_kept")), _share(look_up(layer, "energy.rank_kept")),
         *(_scientific(layer.get(key)) for key in ("output_error_closed_form", "output_error", "residual_error"))]
        for index, layer in enumerate(report["layers"])
    ]  # fmt: skip
    columns = [
        "layer",
        "rank + rotary",
        "RoPE kept",
        "rank kept",
        "output error, closed form",
        "output error",
        "residual error",
    ]
    blocks = [("Every layer in figures", _table(columns, layers, "nnnnnnn"))]
    for name, content in (
        ("Settings", report["settings"]),
        ("Versions", report["versions"]),
        ("Checksums", report["checksums"]),
    ):
        rows = [[name, "–" if value is None else str(value)] for name, value in content.items()]
        blocks.append((name, _table(None, rows, "tc")))
    if report.get("notes"):
        blocks.append(("Notes", "".join(f"<p>{escape(note)}</p>" for note in report["notes"])))
    inside = "".join(f"<details><summary>{name}</summary>{content}</details>" for name, content in blocks)
    version = escape(report["versions"].get("mla_convert", ""))
    return f"<h2>Details</h2>{inside}<footer>Made from report.json by mla_convert {version}.</footer>"


def _section(title: str, words: str, content: str) -> str:
    return f"<section><h2>{title}</h2><p class='note'>{words}</p>{content}</section>"


def _draw(plot: Callable[[int], Figure | None]) -> str:
    """A plot at both widths, of which CSS shows the one that fits; nothing where there is nothing to plot."""
    drawn = [(css, plot(width)) for css, width in (("wide", WIDE), ("narrow", NARROW))]
    if any(figure is None for _, figure in drawn):
        return ""
    return "<figure>" + "".join(str(f).replace("<svg ", f'<svg class="{css}" ', 1) for css, f in drawn) + "</figure>"


def _key(*entries: tuple[str, str]) -> str:
    items = "".join(f'<li class="is-{css}"><i></i>{name}</li>' for css, name in entries)
    return f'<ul class="key">{items}</ul>'


def _table(columns: list[str] | None, rows: list[list[str]], kinds: str) -> str:
    """A table; `kinds` says of each column whether it holds numbers (n), text (t) or code (c)."""
    head = ""
    if columns:
        cells = "".join(f"<th{_align(kind)}>{escape(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
        head = f"<thead><tr>{cells}</tr></thead>"
    body = ""
    for row in rows:
        cells = [
            f"<code>{escape(cell)}</code>" if kind == "c" else escape(cell)
            for cell, kind in zip(row, kinds, strict=True)
        ]
        body += (
            "<tr>"
            + "".join(f"<td{_align(kind)}>{cell}</td>" for cell, kind in zip(cells, kinds, strict=True))
            + "</tr>"
        )
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _align(kind: str) -> str:
    return ' class="n"' if kind == "n" else ""


def _figure(value: float | None, form: str = "{:.3f}") -> str:
    return "not finite" if value is None else form.format(value)


def _ratio(evaluation: dict[str, Any]) -> str:
    return "not finite" if evaluation["ratio"] is None else ratio_words(evaluation)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3%}"


def _scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def _duration(seconds: float) -> str:
    """93.4 -> '1 min 33 s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
