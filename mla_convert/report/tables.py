"""The tables that a conversion, `eval` and `heal` print."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mla_convert.core.report_schema import Comparison, Measurement, Report
from mla_convert.core.units import human_bytes, human_tokens
from mla_convert.evaluate.quality.evaluation import Evaluation
from mla_convert.report import format, frontier
from mla_convert.report.quality_rows import (
    Row,
    heal_table,
    healed_worse,
    kinds_table,
    probe_conditions,
    probe_rows,
    suite_conditions,
    suite_rows,
)
from mla_convert.report.report import fixed_state_rows
from mla_convert.report.table import Table, print_lines

COLUMNS = ("", "before", "after", "change")


def report_table(report: Report, title: str = "") -> Table:
    """Cache and perplexity of a conversion, before and after."""
    cache, evaluation = report.cache, report.measured
    rows: list[Row] = [
        (
            "KV cache per token",
            human_bytes(cache.bytes_per_token.before),
            human_bytes(cache.bytes_per_token.after),
            f"-{cache.share_saved:.1%}",
        )
    ]
    # The saving depends on the context where some layers cache only a sliding window.
    for context, size in cache.bytes_at_context.items():
        rows.append((f"KV cache at {format.context(context)} context", human_bytes(size.before),
                     human_bytes(size.after), f"-{1 - size.after / size.before:.1%}"))  # fmt: skip
    rows += fixed_state_rows(cache)
    if evaluation is None:
        return Table(COLUMNS, [*rows, ("perplexity", "not evaluated", "not evaluated", "")], title)
    unhealed = report.heal and report.heal.before
    if unhealed and isinstance(unhealed.evaluation, Comparison):
        rows.append(_perplexity_row("perplexity, not healed", unhealed.evaluation))
    rows.append(_perplexity_row("perplexity", evaluation))
    if evaluation.held_out:
        rows.append(_perplexity_row("perplexity, held-out text", evaluation.held_out))
    return Table(COLUMNS, [*rows, *suite_rows(evaluation.suite)], title)


def _perplexity_row(name: str, measured: Comparison) -> Row:
    values = (format.number(side.value, 3, format.NOT_FINITE) for side in (measured.before, measured.after))
    return (name, *values, format.ratio(measured))


def print_summary(report: Report, console: Console) -> None:
    """The table at the end of a conversion."""
    rank, rope = report.cache.kv_lora_rank, report.cache.qk_rope_head_dim
    cached = format.latent_words(report.cache.latent_cache)
    console.print(report_table(report, f"{report.source.name} → MLA, rank {rank} + {rope} rotary{cached}").rich())
    evaluation = report.measured
    print_caches(frontier.points(report), console)
    if evaluation is None:
        lines = ["perplexity was not evaluated, as --eval none asked: `mla-convert eval` does it later"]
    else:
        if evaluation.suite:
            console.print(kinds_table(evaluation.suite).rich())
        # A single window has no standard error, and then there is no sign to explain.
        spread = "; ± is one standard error over windows" if "±" in format.ratio(evaluation) else ""
        lines = [f"perplexity on {evaluation.text}: {evaluation.protocol}{spread}"]
        if held_out := evaluation.held_out:
            lines.append(f"held-out text is {held_out.text}: {held_out.protocol}")
        if evaluation.suite:
            lines.append(suite_conditions(evaluation.suite))
    if content := format.content_words(report.layers):
        lines.append(f"{content}, by the closed form")
    lines.append(f"took {report.seconds:.0f} s on {report.device}; written to {report.out}")
    print_lines(lines, console)


def print_caches(found: list[frontier.Point], console: Console) -> None:
    """The model beside the original with quantised caches, where these were measured, and which of them is nearer."""
    if sentence := frontier.verdict(found):
        console.print(frontier.table(found, "quality at equal bytes").rich())
        print_lines([sentence], console)


def evaluation_table(evaluation: Evaluation) -> Table:
    """The result of `eval`: the original, the model, and the change."""
    perplexities = [
        format.spread(side.value, side.value * side.log_error, 3, format.NOT_FINITE) if side else format.NOTHING
        for side in (evaluation.before, evaluation.after)
    ]
    ratio = evaluation.ratio
    change = f"×{format.spread(ratio.value, ratio.value * ratio.error, 4)}" if ratio else format.NOTHING
    before, saved = evaluation.bytes_before, evaluation.share_saved
    rows: list[Row] = [
        ("perplexity", *perplexities, change),
        (
            "KV cache per token",
            format.NOTHING if before is None else human_bytes(before),
            human_bytes(evaluation.bytes_after),
            format.NOTHING if saved is None else f"{-saved:+.1%}",
        ),
    ]
    if evaluation.kl and evaluation.agreement:
        rows.append(("KL divergence, nats", "", format.with_error(evaluation.kl, 5), ""))
        rows.append(("next-token agreement", "", format.with_error(evaluation.agreement, 4), ""))
    title = evaluation.model + (f" against {evaluation.against}" if evaluation.against else "")
    return Table(("", "original", "model", "change"), [*rows, *suite_rows(evaluation.suite)], title)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """The tables at the end of `eval`."""
    console.print(evaluation_table(evaluation).rich())
    if suite := evaluation.suite:
        table = kinds_table(suite)
        if suite.worst is None:  # without an original, only the model's perplexity has values
            table = Table([table.columns[index] for index in (0, 2)], [(row[0], row[2]) for row in table.rows])
        console.print(table.rich())
    print_caches(frontier.points_of_evaluation(evaluation), console)
    if rows := probe_rows(evaluation.probes, next_token=False):
        console.print(Table(("quality probes", "original", "model"), rows).rich())
    lines = [f"on {evaluation.text}: {evaluation.protocol}; ± is one standard error over windows"]
    if evaluation.bytes_before is not None and not evaluation.before_is_measured:
        lines.append("the original's cache is computed from config.json; --against measures it")
    if evaluation.kl:
        lines.append("KL(original ‖ model) and the share of equal most likely next tokens are means over tokens")
    if evaluation.suite:
        lines.append(suite_conditions(evaluation.suite))
    lines += probe_conditions(evaluation.probes, next_token=False)
    lines.append(f"{evaluation.dtype}, logits in float32; took {evaluation.seconds:.0f} s on {evaluation.device}")
    print_lines(lines, console)


def print_healing(report: Report, folder: Path, console: Console) -> None:
    """The table at the end of `heal`."""
    record, evaluation = report.heal, report.measured
    if record is None or record.before is None or evaluation is None or record.settings is None:
        return
    tokens, best = record.tokens or 0, record.best_tokens or 0
    healed = Measurement(evaluation=evaluation, probes=report.probes)
    console.print(heal_table(record.before, healed, f"{report.source.name} → MLA, healed").rich())
    print_caches(frontier.points(report), console)
    stopped = f"; stopped early: {record.stopped}" if record.stopped else ""
    kept = f", kept at {record.share:.0%} of the way there" if (record.share or 1) < 1 else ""
    speed = f"({human_tokens(record.tokens_per_second)} tokens/s)" if record.tokens_per_second else ""
    lines = (
        f"on {evaluation.text}: {evaluation.protocol}; against {record.against}",
        f"{human_tokens(tokens)} tokens of {record.text}, windows of {record.settings.get('length')}, "
        f"{record.settings.train} trained, best after {human_tokens(best)}{kept}{stopped}",
        *healed_worse(record.before, healed),
        f"took {record.seconds:.0f} s on {record.device} {speed}; written to {folder}",
    )
    print_lines(lines, console)
