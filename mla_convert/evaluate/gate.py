"""Pass or fail: figures of a conversion against limits, for a CI job or a test. Imports no torch until it measures.

`check` takes the figures of a report.json, of `eval --json` or of an `Evaluation`, and never passes on a figure that is
missing, NaN, infinite or impossible.
"""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.report_file import find_report, finite, look_up, read_report
from mla_convert.core.words import expanded

DEFAULT_REGRESSION = 0.01
ROUNDING = 1e-9
REGRESSION = "perplexity over the baseline's"
RATIO, AFTER, SAVED = "evaluation.ratio", "evaluation.after.value", "cache.share_saved"
# Of the packaged suite: means over its kinds of text, and the kind that lost most.
KL, AGREEMENT, WORST = "evaluation.suite.kl.value", "evaluation.suite.agreement.value", "evaluation.suite.worst.ratio"
NUMBERS = ("max_ppl_ratio", "max_ppl", "min_kv_saving", "max_regression", "max_kl", "min_agreement", "max_worst_ratio")
# What makes two perplexities comparable.
PROTOCOL = ("evaluation.text", "evaluation.after.windows", "evaluation.after.length")


@dataclass(frozen=True)
class Limits:
    """What must hold; None is not checked.

    `max_ppl_ratio`: perplexity over the original's. `max_ppl`: perplexity. `min_kv_saving`: share of the original's cache
    that is saved (0.7 is 70%). `max_kl`, `min_agreement` and `max_worst_ratio`: of the packaged suite, mean KL(original ‖ model)
    over its kinds of text in nats, share of tokens at which both find the same next token likeliest, and the worst kind's
    perplexity over the original's. `baseline`: figures of an earlier conversion, over whose perplexity ours may be by the share
    `max_regression` (0.01 is 1%, which is also the default).

    Raises:
        UsageError: a limit that is no limit (NaN, infinite, out of range), or a regression without a baseline.
    """

    max_ppl_ratio: float | None = None
    max_ppl: float | None = None
    min_kv_saving: float | None = None
    max_regression: float | None = None
    baseline: Any = None
    max_kl: float | None = None
    min_agreement: float | None = None
    max_worst_ratio: float | None = None

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} {value!r} is not a limit: give a number of at least 0")
        if self.min_kv_saving is not None and self.min_kv_saving > 1:
            raise UsageError(f"min_kv_saving {self.min_kv_saving!r} is above 100%: no cache can be that small")
        if self.min_agreement is not None and self.min_agreement > 1:
            raise UsageError(
                f"min_agreement {self.min_agreement!r} is above 100%: no two models agree more often than always"
            )
        if self.max_regression is not None and self.baseline is None:
            raise UsageError("max_regression needs a baseline to measure from: give --baseline report.json")

    def __bool__(self) -> bool:
        """Whether there is anything to check."""
        return any(getattr(self, item.name) is not None for item in fields(self))

    @property
    def against_original(self) -> bool:
        """Whether any of them can only be checked beside the original."""
        return self.on_suite or self.max_ppl_ratio is not None

    @property
    def on_suite(self) -> bool:
        """Whether any of them is on what the packaged suite measures."""
        return any(getattr(self, name) is not None for name in ("max_kl", "min_agreement", "max_worst_ratio"))


@dataclass(frozen=True)
class GateResult:
    """One check: its figure (None if there is none that counts), its limit, and why it failed if it did.

    `kind` says how to print figure and limit: "ratio", "perplexity", "nats" or "share". `at_least` is whether the limit is a lower
    one.
    """

    name: str
    figure: float | None
    limit: float
    passed: bool
    reason: str = ""
    kind: str = "ratio"
    at_least: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def figure_text(self) -> str:
        """The figure in words."""
        return "–" if self.figure is None else self._text(self.figure)

    @property
    def limit_text(self) -> str:
        """The limit in words."""
        return f"{'≥' if self.at_least else '≤'} {self._text(self.limit)}"

    def _text(self, value: float) -> str:
        if self.kind == "share":
            return f"{value:+.2%}" if self.name == REGRESSION else f"{value:.1%}"
        if self.kind == "nats":
            return f"{value:.4f}"
        return f"×{value:.4f}" if self.kind == "ratio" else f"{value:.3f}"


def percentage(text: str) -> float:
    """`70%` or `0.7` as 0.7.

    Raises:
        UsageError: neither. A bare number above 1 is refused, and so is a bare 1, which may mean 1% or all.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", text)
    if not match:
        raise UsageError(f"{text!r} is not a percentage: give one like 70% or 0.7")
    value = float(match[1])
    if not match[2] and value >= 1:
        raise UsageError(f"{text!r} may mean a percentage or a share: give {match[1]}%, or a number below 1")
    return value / 100 if match[2] else value


def check(figures: Any, limits: Limits | Mapping[str, Any]) -> list[GateResult]:
    """Check figures against limits; one result a limit, in a fixed order.

    `figures` is a `Report`, an `Evaluation`, the content of a report.json, or a path to one (or to its folder); so is
    `limits.baseline`. `limits` may be a mapping: `{"max_ppl_ratio": 1.05, "min_kv_saving": 0.5}`.

    Raises:
        UsageError: no limit, or one that is none.
        InputError: a path without a readable report.
    """
    try:
        limits = limits if isinstance(limits, Limits) else Limits(**limits)
    except TypeError as error:
        raise UsageError(f"limits are {', '.join(item.name for item in fields(Limits))}: {error}") from error
    if not limits:
        raise UsageError(
            "nothing to check: give --max-ppl-ratio, --max-worst-ratio, --max-kl, --min-agreement, --max-ppl, "
            "--min-kv-saving or --baseline"
        )
    figures, results = _mapping(figures), []
    if limits.max_ppl_ratio is not None:
        ratio, reason = _figure(figures, RATIO, "a perplexity ratio", _positive)
        results.append(_result("perplexity over the original's", ratio, limits.max_ppl_ratio, reason))
    if limits.max_ppl is not None:
        after, reason = _figure(figures, AFTER, "a perplexity", _positive)
        results.append(_result("perplexity", after, limits.max_ppl, reason, kind="perplexity"))
    if limits.min_kv_saving is not None:
        saved, reason = _figure(figures, SAVED, "a share of the cache", lambda share: share <= 1)
        results.append(_result("KV cache saved", saved, limits.min_kv_saving, reason, kind="share", at_least=True))
    results += _suite(figures, limits)
    if limits.baseline is not None:
        allowed = DEFAULT_REGRESSION if limits.max_regression is None else limits.max_regression
        change, reason = _regression(figures, _mapping(limits.baseline))
        results.append(_result(REGRESSION, change, allowed, reason, kind="share"))
    return results


def _suite(figures: dict[str, Any], limits: Limits) -> list[GateResult]:
    """Checks of what the packaged suite measured, kind by kind."""
    results = []
    if limits.max_worst_ratio is not None:
        worst, reason = _figure(figures, WORST, "a perplexity ratio", _positive)
        kind = look_up(figures, "evaluation.suite.worst.kind")
        name = f"perplexity over the original's, worst kind of text{f' ({kind})' if isinstance(kind, str) else ''}"
        results.append(_result(name, worst, limits.max_worst_ratio, reason))
    if limits.max_kl is not None:
        kl, reason = _figure(figures, KL, "a divergence", lambda nats: nats >= 0)
        results.append(_result("KL divergence, mean over kinds of text", kl, limits.max_kl, reason, kind="nats"))
    if limits.min_agreement is not None:
        share, reason = _figure(figures, AGREEMENT, "a share of tokens", lambda share: 0 <= share <= 1)
        found = _result("next-token agreement, mean over kinds of text", share, limits.min_agreement, reason, kind="share",
                        at_least=True)  # fmt: skip
        results.append(found)
    return results


def _mapping(figures: Any) -> dict[str, Any]:
    if isinstance(figures, str | os.PathLike):
        return read_report(Path(figures))
    if hasattr(figures, "as_dict"):
        return figures.as_dict()
    return dict(figures)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: float) -> bool:
    return value > 0


def _figure(
    figures: dict[str, Any], path: str, what: str, possible: Callable[[float], bool]
) -> tuple[float | None, str]:
    """A figure and "", or None and why there is none that counts."""
    value = look_up(figures, path)
    if value is None and path.startswith("evaluation.") and look_up(figures, "evaluation.skipped"):
        return (
            None,
            "the model was converted with --eval none and is not evaluated: leave out --from-report to measure it",
        )
    if value is None:
        return None, f"{path} is missing, or was not a finite number when it was written"
    if not _is_number(value):
        return None, f"{path} is not a number"
    if not math.isfinite(value):
        return None, f"{path} is {'NaN' if math.isnan(value) else 'infinite'}"
    if not possible(value):
        return None, f"{path} is {value:g}, which cannot be {what}"
    return float(value), ""


def _regression(figures: dict[str, Any], baseline: dict[str, Any]) -> tuple[float | None, str]:
    """By which share our perplexity is above the baseline's, over the same windows of text."""
    now, reason = _figure(figures, AFTER, "a perplexity", _positive)
    if now is None:
        return None, reason
    before, reason = _figure(baseline, AFTER, "a perplexity", _positive)
    if before is None:
        return None, f"baseline: {reason}"
    for path in PROTOCOL:
        ours, theirs = (_bare(look_up(content, path)) for content in (figures, baseline))
        if ours is None or ours != theirs:
            return None, f"measured on other text than the baseline: {path} is {ours!r}, the baseline's {theirs!r}"
    return now / before - 1, ""


def _bare(label: Any) -> Any:
    """A text's label without the remark in brackets on how it was come by."""
    return label.partition(" (")[0] if isinstance(label, str) else label


def _result(
    name: str, figure: float | None, limit: float, reason: str, kind: str = "ratio", at_least: bool = False
) -> GateResult:
    # 1 - 0.9 is a little less than 0.1 to a computer
    passed = figure is not None and (figure >= limit - ROUNDING if at_least else figure <= limit + ROUNDING)
    found = GateResult(name, figure, limit, passed, reason, kind, at_least)
    if passed or reason:
        return found
    side = "below" if at_least else "above"
    shown, most = found.figure_text, found._text(limit)
    if shown == most:
        shown, most = f"{figure:.10g}", f"{limit:.10g}"
    text = f"{shown} is {side} the limit of {most}"
    return GateResult(name, figure, limit, passed, text, kind, at_least)


@dataclass(frozen=True)
class Verdict:
    """All checks of one model. `basis` says where the figures come from."""

    model: str
    basis: str
    results: list[GateResult]
    figures: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return bool(self.results) and all(result.passed for result in self.results)

    @property
    def summary(self) -> str:
        """One line: how many failed, and the first one's reason."""
        failed = [result for result in self.results if not result.passed]
        if not failed:
            return f"{len(self.results)} of {len(self.results)} gates passed"
        return f"{len(failed)} of {len(self.results)} gates failed: {failed[0].name}: {failed[0].reason}"

    def as_dict(self) -> dict[str, Any]:
        """Verdict, checks and the figures they were made on."""
        figures = {key: self.figures.get(key) for key in ("cache", "evaluation")}
        return finite({"model": self.model, "passed": self.passed, "basis": self.basis,
                       "gates": [result.as_dict() for result in self.results], "figures": figures})  # fmt: skip


def run_gate(
    model: str, limits: Limits, from_report: bool = False, against: str | None = None, **options: Any
) -> Verdict:
    """Measure a model, or trust its report.json, and check it.

    Where a limit needs the original and `against` is not given, it is the one that report.json names. `options` are those
    of `evaluate.evaluate_model`.

    Raises:
        UsageError: no limit.
        InputError: a model, report or text that cannot be used, or an original that is needed and cannot be found.
        ResourceError: the Hub or the device is not there.
    """
    if not limits:
        check({}, limits)
    baseline = limits.baseline
    if isinstance(baseline, str | os.PathLike):  # before hours of measuring
        baseline = read_report(Path(baseline))
    limits = replace(limits, baseline=baseline)
    if from_report:
        figures, name = _report_of(model)
        return Verdict(name, "trusted from report.json, not measured again", check(figures, limits), figures)

    from mla_convert.evaluate.quality.evaluation import evaluate_model
    from mla_convert.source.load_model import find_model, find_original

    origin: Any = against
    if limits.against_original and against is None:
        place = find_model(model)
        origin = find_original(find_report(place.folder))
        if origin is None:
            raise InputError(
                f"{'a perplexity ratio' if limits.max_ppl_ratio is not None else 'a distance'} needs the original of "
                f"{place.label}, which its report.json does not lead to: give it with --against"
            )
    if not limits.on_suite and options.get("suite_windows") is None:
        options["suite_windows"] = 0  # nobody asks for it
    evaluation = evaluate_model(model, origin, **options)
    figures = evaluation.as_dict()
    basis = f"measured on {evaluation.text}, {evaluation.protocol}, {evaluation.dtype}"
    if evaluation.against:
        basis += f", against {evaluation.against}"
    return Verdict(evaluation.model, basis, check(figures, limits), figures)


def _report_of(model: str) -> tuple[dict[str, Any], str]:
    """The report of a local folder, of its own path, or of a Hub id; and the model's name."""
    path = expanded(model)
    if not path.exists():
        from mla_convert.source.place import locate

        place = locate(model, files=["report.json"])
        return read_report(place.folder), place.label
    return read_report(path), (path if path.is_dir() else path.parent).resolve().name


def junit_xml(verdict: Verdict, seconds: float) -> str:
    """The verdict as JUnit XML, a test case for each gate."""
    failed = sum(not result.passed for result in verdict.results)
    counts = {"tests": str(len(verdict.results)), "failures": str(failed), "errors": "0", "time": f"{seconds:.3f}"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(f"mla-convert gate {verdict.model}"), **counts})
    properties = ElementTree.SubElement(suite, "properties")
    ElementTree.SubElement(properties, "property", {"name": "basis", "value": _xml(verdict.basis)})
    for result in verdict.results:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "mla_convert.gate", "name": result.name, "time": "0"}
        )
        if not result.passed:
            failure = ElementTree.SubElement(case, "failure", {"message": _xml(result.reason), "type": "GateFailed"})
            failure.text = _xml(f"{result.name}: {result.figure_text}, limit {result.limit_text}. {result.reason}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True).decode() + "\n"


def _xml(text: str) -> str:
    """Without the control characters that XML 1.0 cannot hold."""
    return re.sub(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def markdown(verdict: Verdict) -> str:
    """The verdict as a Markdown table, for a job's summary."""
    lines = [f"### {'✅' if verdict.passed else '❌'} mla-convert gate: {_cell(verdict.model)}", "",
             "| check | figure | limit | result |", "|---|---:|---:|---|"]  # fmt: skip
    for result in verdict.results:
        outcome = "pass" if result.passed else f"**fail**: {_cell(result.reason)}"
        lines.append(f"| {result.name} | {result.figure_text} | {result.limit_text} | {outcome} |")
    return "\n".join([*lines, "", f"Figures {_cell(verdict.basis)}.", "", ""])


def _cell(text: str) -> str:
    """Text that stays inside a cell of a Markdown table, and text: no markup, no lines."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def error_lines(verdict: Verdict) -> list[str]:
    """A workflow command for each failed gate, escaped as GitHub's toolkit does."""
    return [f"::error::{_escape(f'mla-convert gate, {verdict.model}: {result.name}: {result.reason}')}"
            for result in verdict.results if not result.passed]  # fmt: skip


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
