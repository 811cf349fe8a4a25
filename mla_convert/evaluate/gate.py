"""Pass or fail: the results of a conversion against limits, for a CI job or a test. Imports no torch until it measures.

`check` takes the content of a report.json or of `eval --json`, a `Report` or an `Evaluation`, and never passes on a value that is
missing, NaN, infinite or impossible.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.report_file import REPORT, find_content, look_up, read_content
from mla_convert.core.report_schema import JsonObject, to_json
from mla_convert.core.words import expanded

DEFAULT_REGRESSION = 0.01
ROUNDING = 1e-9
REGRESSION = "perplexity over the baseline's"
RATIO, AFTER, SAVED = "evaluation.ratio", "evaluation.after.value", "cache.share_saved"
# On the packaged suite: means over its kinds of text, and the kind whose perplexity grew most.
KL, AGREEMENT, WORST = "evaluation.suite.kl.value", "evaluation.suite.agreement.value", "evaluation.suite.worst.ratio"
NUMBERS = ("max_ppl_ratio", "max_ppl", "min_kv_saving", "max_regression", "max_kl", "min_agreement", "max_worst_ratio")
# Two perplexities are comparable where these are equal.
PROTOCOL = ("evaluation.text", "evaluation.after.windows", "evaluation.after.length")


@dataclass(frozen=True)
class Limits:
    """Limits; None is not checked.

    Args:
        max_ppl_ratio: largest perplexity over the original's.
        max_ppl: largest perplexity.
        min_kv_saving: smallest share of the original's cache that is saved (0.7 is 70%).
        max_regression: by which share perplexity may be above the baseline's (0.01 is 1%, which is also the default).
        baseline: results of an earlier conversion, in any form that `check` takes.
        max_kl: largest KL(original ‖ model) of the next token in nats, mean over the packaged suite's kinds of text.
        min_agreement: smallest share of tokens with the same most likely next token, mean over the suite's kinds.
        max_worst_ratio: largest perplexity over the original's on the suite's worst kind of text.

    Raises:
        UsageError: a limit is NaN, infinite or out of range, or a regression has no baseline.
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
        """Whether a limit needs the original."""
        return self.on_suite or self.max_ppl_ratio is not None

    @property
    def on_suite(self) -> bool:
        """Whether a limit is on the packaged suite."""
        return any(getattr(self, name) is not None for name in ("max_kl", "min_agreement", "max_worst_ratio"))


@dataclass(frozen=True)
class GateResult:
    """One check.

    Attributes:
        name: the quantity.
        figure: its value; None where it has none that counts.
        limit: what the value was compared with.
        passed: whether the value is within the limit.
        reason: why the check failed.
        kind: how value and limit are printed: "ratio", "perplexity", "nats" or "share".
        at_least: whether the limit is a lower one.
    """

    name: str
    figure: float | None
    limit: float
    passed: bool
    reason: str = ""
    kind: str = "ratio"
    at_least: bool = False

    def as_dict(self) -> JsonObject:
        """For `gate --json`."""
        return asdict(self)

    @property
    def figure_text(self) -> str:
        """The value as it is printed."""
        return "–" if self.figure is None else self._text(self.figure)

    @property
    def limit_text(self) -> str:
        """The limit as it is printed."""
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
        UsageError: it is neither. Bare numbers from 1 on are refused, because 1 may mean 1% or all.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", text)
    if not match:
        raise UsageError(f"{text!r} is not a percentage: give one like 70% or 0.7")
    value = float(match[1])
    if not match[2] and value >= 1:
        raise UsageError(f"{text!r} may mean a percentage or a share: give {match[1]}%, or a number below 1")
    return value / 100 if match[2] else value


def check(figures: Any, limits: Limits | Mapping[str, Any]) -> list[GateResult]:
    """Check results against limits; one check a limit, in a fixed order.

    Args:
        figures: a `Report`, an `Evaluation`, the content of a report.json, or a path to one (or to its folder).
        limits: the limits, or a mapping: `{"max_ppl_ratio": 1.05, "min_kv_saving": 0.5}`.

    Raises:
        UsageError: there is no limit, or one is out of range.
        InputError: a path leads to no readable report.
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


def _suite(figures: JsonObject, limits: Limits) -> list[GateResult]:
    """Checks on the packaged suite."""
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
        name = "next-token agreement, mean over kinds of text"
        results.append(_result(name, share, limits.min_agreement, reason, kind="share", at_least=True))
    return results


def _mapping(figures: Any) -> JsonObject:
    if isinstance(figures, str | os.PathLike):
        return read_content(Path(figures))
    if hasattr(figures, "as_dict"):
        return figures.as_dict()
    return dict(figures)


def _is_number(value: Any) -> bool:
    # True is an integer in Python, and would pass as 1.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: float) -> bool:
    return value > 0


def _figure(figures: JsonObject, path: str, what: str, possible: Callable[[float], bool]) -> tuple[float | None, str]:
    """The value at `path` and "", or None and the reason why it does not count."""
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


def _regression(figures: JsonObject, baseline: JsonObject) -> tuple[float | None, str]:
    """By which share the perplexity is above the baseline's, on the same windows of text."""
    now, reason = _figure(figures, AFTER, "a perplexity", _positive)
    if now is None:
        return None, reason
    before, reason = _figure(baseline, AFTER, "a perplexity", _positive)
    if before is None:
        return None, f"baseline: {reason}"
    for path in PROTOCOL:
        value, expected = (_bare(look_up(content, path)) for content in (figures, baseline))
        # Two reports that lack an entry are not known to be of the same text.
        if value is None or value != expected:
            return None, f"measured on other text than the baseline: {path} is {value!r}, the baseline's {expected!r}"
    return now / before - 1, ""


def _bare(label: Any) -> Any:
    """A text's label without the remark in brackets that says why it was chosen."""
    return label.partition(" (")[0] if isinstance(label, str) else label


def _result(
    name: str, figure: float | None, limit: float, reason: str, kind: str = "ratio", at_least: bool = False
) -> GateResult:
    # in floating point 1 - 0.9 is a little less than 0.1
    passed = figure is not None and (figure >= limit - ROUNDING if at_least else figure <= limit + ROUNDING)
    result = GateResult(name, figure, limit, passed, reason, kind, at_least)
    if passed or reason:
        return result
    side = "below" if at_least else "above"
    value, most = result.figure_text, result._text(limit)
    if value == most:  # they differ in digits that are not shown
        value, most = f"{figure:.10g}", f"{limit:.10g}"
    return replace(result, reason=f"{value} is {side} the limit of {most}")


@dataclass(frozen=True)
class Verdict:
    """All checks of one model. `basis` says whether `figures` were measured or read from a report."""

    model: str
    basis: str
    results: list[GateResult]
    figures: JsonObject

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        # Nothing checked is nothing passed.
        return bool(self.results) and all(result.passed for result in self.results)

    @property
    def summary(self) -> str:
        """How many checks failed, and the first one's reason, in one line."""
        failed = [result for result in self.results if not result.passed]
        if not failed:
            return f"{len(self.results)} of {len(self.results)} gates passed"
        return f"{len(failed)} of {len(self.results)} gates failed: {failed[0].name}: {failed[0].reason}"

    def as_dict(self) -> JsonObject:
        """For `gate --json`: verdict, checks, and the values that were checked."""
        figures = {key: self.figures.get(key) for key in ("cache", "evaluation")}
        return to_json({"model": self.model, "passed": self.passed, "basis": self.basis,
                       "gates": [result.as_dict() for result in self.results], "figures": figures})  # fmt: skip


def run_gate(
    model: str, limits: Limits, from_report: bool = False, against: str | None = None, **options: Any
) -> Verdict:
    """Measure a model, or trust its report.json, and check it.

    Args:
        model: a folder, Hub id, `.gguf` file or recipe; with `from_report` also a report.json.
        limits: the limits.
        from_report: whether to trust report.json.
        against: the original; where a limit needs one and none is given, the one that report.json names.
        options: of `evaluate_model`.

    Raises:
        UsageError: there is no limit.
        InputError: a model, report or text cannot be used, or the original is needed and cannot be found.
        ResourceError: the Hub or the device is not there.
    """
    if not limits:
        # Called for its error, which comes before hours of measuring.
        check({}, limits)
    baseline = limits.baseline
    if isinstance(baseline, str | os.PathLike):  # a bad path fails before hours of measuring
        baseline = read_content(Path(baseline))
    limits = replace(limits, baseline=baseline)
    if from_report:
        figures, name = _report_of(model)
        return Verdict(name, "trusted from report.json, not measured again", check(figures, limits), figures)

    from mla_convert.evaluate.quality.evaluation import evaluate_model
    from mla_convert.source.load_model import find_model, find_original

    origin: Any = against
    if limits.against_original and against is None:
        place = find_model(model)
        origin = find_original(find_content(place.folder))
        if origin is None:
            raise InputError(
                f"{'a perplexity ratio' if limits.max_ppl_ratio is not None else 'a distance'} needs the original of "
                f"{place.label}, which its report.json does not lead to: give it with --against"
            )
    if not limits.on_suite and options.get("suite_windows") is None:
        options["suite_windows"] = 0  # no limit needs the suite
    evaluation = evaluate_model(model, origin, **options)
    figures = evaluation.as_dict()
    basis = f"measured on {evaluation.text}, {evaluation.protocol}, {evaluation.dtype}"
    if evaluation.against:
        basis += f", against {evaluation.against}"
    return Verdict(evaluation.model, basis, check(figures, limits), figures)


def _report_of(model: str) -> tuple[JsonObject, str]:
    """The report of a local folder, of a report.json or of a Hub id; and the model's name."""
    path = expanded(model)
    if not path.exists():
        from mla_convert.source.place import locate

        # The report alone is fetched, and no weights.
        place = locate(model, files=[REPORT])
        return read_content(place.folder), place.label
    return read_content(path), (path if path.is_dir() else path.parent).resolve().name
