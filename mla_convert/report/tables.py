"""The tables that a conversion, `eval` and `heal` print."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mla_convert.core.report_file import finite, is_evaluated
from mla_convert.core.units import human_bytes
from mla_convert.evaluate.quality import kinds
from mla_convert.evaluate.quality.evaluation import Evaluation
from mla_convert.report.quality_rows import conditions, probe_rows, ratio_error, ratio_words
from mla_convert.report.report import Report


def report_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """The result in report_rows of (what, before, after, change)."""
    cache, evaluation = report.cache, report.evaluation
    saved = f"-{cache['share_saved']:.1%}"
    per_token = cache["bytes_per_token"]
    table = [("KV cache per token", human_bytes(per_token["before"]), human_bytes(per_token["after"]), saved)]
    for context, size in cache["bytes_at_context"].items():
        table.append((f"KV cache at {int(context) // 1024}k context", human_bytes(size["before"]),
                      human_bytes(size["after"]), f"-{1 - size['after'] / size['before']:.1%}"))  # fmt: skip
    if not is_evaluated(evaluation):
        return [*table, ("perplexity", "not evaluated", "not evaluated", "")]
    before, after = evaluation["before"]["value"], evaluation["after"]["value"]
    if unhealed := report.heal.get("before"):
        value = unhealed["evaluation"]["after"]["value"]
        table.append(("perplexity, not healed", f"{before:.3f}", _number(value), ratio_words(unhealed["evaluation"])))
    table.append(("perplexity", f"{before:.3f}", f"{after:.3f}", ratio_words(evaluation)))
    if held_out := evaluation.get("held_out"):
        before, after = held_out["before"]["value"], held_out["after"]["value"]
        table.append(("perplexity, held-out text", f"{before:.3f}", f"{after:.3f}", ratio_words(held_out)))
    return table + kinds.summary_rows(finite(evaluation.get("suite")))


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def print_summary(report: Report, console: Console) -> None:
    """The compact table at the end of a run."""
    rank, rope = report.cache["kv_lora_rank"], report.cache["qk_rope_head_dim"]
    table = Table(title=f"{report.source['name']} → MLA, rank {rank} + {rope} rotary", title_justify="left")
    for column, justify in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        table.add_column(column, justify=justify)
    for row in report_rows(report):
        table.add_row(*row)
    console.print(table)
    evaluation = report.evaluation
    if suite := finite(evaluation.get("suite")):
        console.print(kinds.table(suite))
    spread = "; ± is one standard error over windows" if ratio_error(evaluation) else ""
    texts = ["perplexity was not evaluated, as --eval none asked: `mla-convert eval` does it later"]
    if is_evaluated(evaluation):
        texts = [f"perplexity on {evaluation['text']}: {evaluation['protocol']}{spread}"]
    if held_out := evaluation.get("held_out"):
        texts.append(f"held-out text is {held_out['text']}: {held_out['protocol']}")
    if suite:
        texts.append(kinds.conditions(suite))
    for text in texts:
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"took {report.seconds:.0f} s on {report.device}; written to {report.out}", highlight=False, soft_wrap=True
    )


def evaluation_rows(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """What was measured in evaluation_rows of (what, original, model, change)."""
    found, nothing = evaluation, "–"
    table = [
        (
            "perplexity",
            _with_error(found.before.value, found.before.value * found.before.log_error, 3)
            if found.before
            else nothing,
            _with_error(found.after.value, found.after.value * found.after.log_error, 3),
            "×" + _with_error(found.ratio.value, found.ratio.value * found.ratio.error, 4) if found.ratio else nothing,
        ),
        (
            "KV cache per token",
            nothing if found.bytes_before is None else human_bytes(found.bytes_before),
            human_bytes(found.bytes_after),
            nothing if found.share_saved is None else f"{-found.share_saved:+.1%}",
        ),
    ]
    if found.kl and found.agreement:
        table.append(("KL divergence, nats", "", _with_error(found.kl.value, found.kl.error, 5), ""))
        table.append(("next-token agreement", "", _with_error(found.agreement.value, found.agreement.error, 4), ""))
    return table + kinds.summary_rows(finite(found.suite))


def _with_error(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """The table at the end of `eval`."""
    title = Text(evaluation.model + (f" against {evaluation.against}" if evaluation.against else ""))
    table = Table(title=title, title_justify="left")
    for column, justify in (("", "left"), ("original", "right"), ("model", "right"), ("change", "right")):
        table.add_column(column, justify=justify)
    for row in evaluation_rows(evaluation):
        table.add_row(*row)
    console.print(table)
    if evaluation.suite:
        console.print(kinds.table(finite(evaluation.suite)))
    if probed := probe_rows(evaluation.beyond):
        table = Table()
        for column, justify in (("beyond perplexity", "left"), ("original", "right"), ("model", "right")):
            table.add_column(column, justify=justify)
        for cells in probed:
            table.add_row(*map(Text, cells))
        console.print(table)
    lines = [f"on {evaluation.text}: {evaluation.protocol}; ± is one standard error over windows",
             f"{evaluation.dtype}, logits in float32; took {evaluation.seconds:.0f} s on {evaluation.device}"]  # fmt: skip
    if evaluation.kl:
        lines.insert(1, "KL(original ‖ model) and the share of equal most likely next tokens are means over tokens")
    if evaluation.bytes_before is not None and not evaluation.before_is_measured:
        lines.insert(1, "the original's cache is computed from config.json; --against measures it")
    if evaluation.suite:
        lines[-1:-1] = [kinds.conditions(evaluation.suite)]
    lines[-1:-1] = conditions({key: part for key, part in evaluation.beyond.items() if key != "next_token"})
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
