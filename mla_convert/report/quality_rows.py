"""Tables of quality and the sentences below them: perplexity, kinds of text, quality probes, healing. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable

from mla_convert.core.report_schema import (
    EvaluationSection,
    HumanEval,
    HumanEvalResult,
    KindEntry,
    Mean,
    Measurement,
    PasskeyMeans,
    PasskeyValues,
    Perplexity,
    ProbesSection,
    SuiteSection,
)
from mla_convert.report import format
from mla_convert.report.table import Table

Row = tuple[str, ...]
KIND_COLUMNS = ("text", "original", "model", "change", "KL", "KL, 99%", "agree")
PASSKEY_COLUMNS = ("length", "keys", "depth", "found, original", "converted", "log-probability, original", "converted")
# The two values of passkey retrieval: words of a table, and the entry in a report.
PASSKEY = (("pass key found", "match"), ("its log-probability", "log_probability"))

# The values of greedy continuations: words, digits, and the entry in a report.
CONTINUATIONS = (("tokens until the end", 1, "length"), ("repeated", 3, "repeated"))


# ---- kinds of text


def kinds_table(suite: SuiteSection) -> Table:
    """Every kind of text, the worst first; without an original only the model's perplexity has values."""
    # A ratio that is not finite is worse than any number.
    order = sorted(suite.kinds.items(), key=lambda item: -item[1].ratio if math.isfinite(item[1].ratio) else -math.inf)
    return Table(KIND_COLUMNS, [_kind_row(name, entry) for name, entry in order])


def _kind_row(name: str, entry: KindEntry) -> Row:
    return (name, format.perplexity(_value(entry.before)), format.perplexity(entry.after.value),
            format.times(entry.ratio, 3, format.NOTHING), format.number(_value(entry.kl), 4),
            format.number(entry.kl.p99 if entry.kl else None, 3), format.percent(_value(entry.agreement)))  # fmt: skip


def compared(suite: SuiteSection | None) -> bool:
    """Whether the suite was measured against an original."""
    return suite is not None and suite.worst is not None


def suite_rows(suite: SuiteSection | None) -> list[Row]:
    """Rows of (quantity, before, after, change): the worst kind, mean KL and mean agreement."""
    if suite is None or suite.worst is None:
        return []
    worst = suite.worst.kind
    _, before, after, change, *_ = _kind_row(worst, suite.kinds[worst])
    return [
        (f"perplexity, worst kind of text: {worst}", before, after, change),
        ("KL(original ‖ converted), mean over kinds", "", f"{format.number(_value(suite.kl), 4)} nats", ""),
        ("next-token agreement, mean over kinds", "", format.percent(_value(suite.agreement)), ""),
    ]


def suite_headline(suite: SuiteSection) -> str:
    """The worst kind and the mean KL in a few words."""
    if suite.worst is None:
        return ""
    kl = format.number(_value(suite.kl), 4)
    return f"{format.times(suite.worst.ratio, 3)} on the worst kind of text ({suite.worst.kind}), KL {kl} nats over all kinds"


def suite_conditions(suite: SuiteSection) -> str:
    """The conditions of the suite's table, in sentences."""
    words = f"Kinds of text: {suite.protocol}"
    if compared(suite):
        words += "; perplexities; KL(original ‖ converted) of the next token in nats, its mean and 99th percentile over tokens; "
        words += "share of tokens at which both find the same next token likeliest"
    return words + "."


# ---- quality probes


def probe_rows(probes: ProbesSection, next_token: bool = True) -> list[Row]:
    """Rows of (quantity, original, model). A quantity that compares the two has one value, under the model.

    Args:
        probes: the probes of a report.
        next_token: whether to include the distance of the next-token distributions.
    """
    rows: list[Row] = []
    if next_token and probes.next_token:
        rows.append(("KL divergence, nats", "", format.with_error(probes.next_token.kl, 5)))
        rows.append(("next-token agreement", "", format.with_error(probes.next_token.agreement, 4)))
    if greedy := probes.greedy:
        rows.append((f"greedy, same at first ({greedy.tokens} tokens)", "", format.with_error(greedy.prefix, 3)))
        rows.append((f"greedy, same to the end ({greedy.prompts} prompts)", "", format.with_error(greedy.exact, 3)))
        for words, digits, name in CONTINUATIONS:
            values = [getattr(side, name) if side else None for side in (greedy.before, greedy.after)]
            if any(values):
                rows.append((f"greedy, {words}", *(format.with_error(value, digits) for value in values)))
    for entry in (probes.passkey and probes.passkey.lengths) or []:
        for words, name in PASSKEY:
            before, after = (format.with_error(_mean(side, name), 2) for side in (entry.before, entry.after))
            among = f" among {entry.needles}" if entry.needles > 1 else ""
            rows.append((f"{words}{among}, {entry.length} tokens", before, after))
    if probe := probes.humaneval:
        before, after = (_passes(side) for side in (probe.before, probe.after))
        rows.append(("HumanEval, problems passed", before, after))
    for name, task in ((probes.tasks and probes.tasks.results) or {}).items():
        for metric, sides in task.metrics.items():
            cells = (format.with_error(side, 4) for side in (sides.before, sides.after))
            rows.append((f"{name}, {metric}", *cells))
    return rows


def passkey_table(probes: ProbesSection) -> Table | None:
    """Shares of pass keys found and their log-probabilities, by length and depth."""
    cells = probes.passkey and probes.passkey.results
    if not cells:
        return None
    rows = [
        (f"{cell.length:,}", f"{cell.needles}", f"{cell.depth:.0%}",
         *(format.number(_single(side, name), 2) for _, name in PASSKEY for side in (cell.before, cell.after)))
        for cell in cells
    ]  # fmt: skip
    return Table(PASSKEY_COLUMNS, rows, align="r" * len(PASSKEY_COLUMNS))


def probe_conditions(probes: ProbesSection, next_token: bool = True) -> list[str]:
    """The conditions of each probe, a sentence each. Arguments as for `probe_rows`."""
    sentences = []
    if next_token and (part := probes.next_token):
        sentences.append(f"KL(original ‖ model) and next-token agreement: {part.text}, {part.protocol}.")
    if greedy := probes.greedy:
        sentences.append(
            f"Greedy continuations: {greedy.prompts} prompts of {greedy.prompt_tokens} tokens of {greedy.text}, "
            f"up to {greedy.tokens} tokens each; same at first is the share before the "
            f"first different token; repeated is the share of a continuation's sequences of four tokens that stand in it "
            f"before. ± is over prompts."
        )
    if passkey := probes.passkey:
        sentences.append(
            f"Pass key: five digits in filler text, {passkey.keys} prompts at each length and depth; with several keys, one at "
            f"each depth, the prompt asks for one by its name; log-probability in nats of the whole key, "
            f"{passkey.guessing:.2f} for guessing evenly."
        )
    if probe := probes.humaneval:
        sentences.append(_humaneval_words(probe))
    if tasks := probes.tasks:
        limit = f", at most {tasks.limit} examples a task" if tasks.limit else ""
        sentences.append(f"Tasks: lm-evaluation-harness {tasks.harness}{limit}.")
    return sentences


def _passes(side: HumanEvalResult | None) -> str:
    return format.NOTHING if side is None else f"{side.passed} of {side.total}"


def _humaneval_words(probe: HumanEval) -> str:
    asked = "through the chat template" if probe.templated else "by raw completion"
    words = f"HumanEval: greedy decoding {asked}, at most {probe.max_new_tokens} new tokens"
    if part := probe.difference:
        spread = format.spread(100 * part.value, 100 * part.error, 1)
        words += (
            f"; both pass {part.both}, the original alone {part.only_original}, the converted model alone {part.only_converted}; "
            f"difference {spread} percentage points, ± one paired standard error"
        )
    return words + "."


# ---- healing


def heal_table(before: Measurement, after: Measurement, title: str = "") -> Table:
    """The converted model before and after healing."""
    sides = (before, after)
    rows: list[Row] = [("perplexity over the original's", *(_ratio(side) for side in sides))]
    for words, form, read in SUITE_ROWS:
        # Models that earlier versions converted have no suite.
        values = [read(suite) if suite else None for suite in map(_suite, sides)]
        if any(value is not None for value in values):
            rows.append((words, *(form.format(format.number(value, 4)) for value in values)))
    for words, digits, name in (("KL divergence, nats", 5, "kl"), ("next-token agreement", 4, "agreement")):
        parts = (side.probes and side.probes.next_token for side in sides)
        rows.append((words, *(format.with_error(getattr(part, name) if part else None, digits) for part in parts)))
    lengths = [(side.probes and side.probes.passkey and side.probes.passkey.lengths) or [] for side in sides]
    # A side on which pass keys were not measured has no lengths, and then there is no row.
    for entries in zip(*lengths, strict=False):
        for words, name in PASSKEY:
            cells = (format.with_error(_mean(entry.after, name), 2) for entry in entries)
            among = f" among {entries[0].needles}" if entries[0].needles > 1 else ""
            rows.append((f"{words}{among}, {entries[0].length} tokens", *cells))
    return Table(("", "not healed", "healed"), rows, title)


SUITE_ROWS: tuple[tuple[str, str, Callable[[SuiteSection], float | None]], ...] = (
    ("worst kind of text, over the original's", "×{}", lambda suite: suite.worst.ratio if suite.worst else None),
    ("KL, mean over kinds", "{}", lambda suite: _value(suite.kl)),
)


def _ratio(side: Measurement) -> str:
    if not isinstance(side.evaluation, EvaluationSection):
        return format.NOTHING
    return f"×{format.spread(side.evaluation.ratio, side.evaluation.ratio_error, 4)}"


def _suite(side: Measurement) -> SuiteSection | None:
    return side.evaluation.suite if isinstance(side.evaluation, EvaluationSection) else None


def _value(entry: Perplexity | Mean | None) -> float | None:
    return entry.value if entry else None


def _mean(side: PasskeyMeans | None, name: str) -> Mean | None:
    return getattr(side, name) if side else None


def _single(side: PasskeyValues | None, name: str) -> float | None:
    return getattr(side, name) if side else None


def healed_worse(before: Measurement, after: Measurement) -> list[str]:
    """A sentence where the mean KL over the kinds of text rose by healing."""
    suites = [_suite(before), _suite(after)]
    if not all(compared(suite) for suite in suites):
        return []
    first, second = (suite.kl.value for suite in suites if suite and suite.kl)
    if not second > first:
        return []
    nearer = "over the kinds of text, the model that was not healed is nearer to its original"
    return [f"{nearer}: mean KL {first:.4f}, healed {second:.4f}"]
