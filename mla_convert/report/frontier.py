"""Distance from the original against bytes of the cache: a conversion beside the original with quantised caches. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mla_convert.core.original_cache import words
from mla_convert.core.report_schema import (
    EarlierState,
    EvaluationSection,
    JsonObject,
    Mean,
    Measurement,
    OriginalCacheSection,
    Report,
    SuiteSection,
    SweepReport,
)
from mla_convert.report import format
from mla_convert.report.table import Table

if TYPE_CHECKING:
    from mla_convert.evaluate.quality.evaluation import Evaluation

# The original with a quantised cache; latents of the model's own numbers; quantised latents.
Series = Literal["original", "rank", "quantised"]
COLUMNS = ("cache", "bytes", "KL, nats", "agree", "perplexity", "KL, kinds")
# Bytes are shares of the original's; a smaller difference is rounding.
EQUAL = 1e-6


@dataclass(frozen=True)
class Point:
    """One cache and its distance from the original.

    Attributes:
        name: in tables and beside its mark; empty where only its size is known.
        series: that it belongs to.
        share: bytes of its cache over those of the original's.
        kl: KL(original ‖ model) of the next token in nats.
        agreement: share of tokens with the same most likely next token.
        ratio: perplexity over the original's.
        ratio_error: its standard error.
        suite_kl: mean KL over the packaged suite's kinds of text.
        current: whether this is the model that the report is about.
        size: whether this is one of the sizes of a sweep, which a line joins and whose names a chart leaves out.
    """

    name: str
    series: Series
    share: float
    kl: Mean
    agreement: Mean | None = None
    ratio: float = math.nan
    ratio_error: float = math.nan
    suite_kl: Mean | None = None
    current: bool = False
    size: bool = False

    @property
    def short(self) -> str:
        """The name beside its mark: of a cache of the original, the format alone."""
        return self.name.removeprefix("original, ").removesuffix(" cache")


def points(report: Report) -> list[Point]:
    """The model of a report, its earlier states, the sizes of its sweep and the original's quantised caches.

    Only what was measured on the same windows as the model is among them.
    """
    evaluation = report.measured
    if evaluation is None:
        return []
    where = evaluation.text, evaluation.protocol
    share, kl = 1 - report.cache.share_saved, _kl(Measurement(evaluation=evaluation, probes=report.probes), where)
    found = [_earlier(state) for state in report.earlier_states or [] if (state.text, state.protocol) == where]
    if report.heal and not report.earlier_states:
        found += _unhealed(report, where)
    if kl:
        name, cache = "healed" if report.heal else "converted", report.cache.latent_cache
        found.append(Point(_named(name, cache), _series(cache), share, kl, _agreement(evaluation, report),
                           evaluation.ratio, evaluation.ratio_error, _suite_kl(evaluation.suite), True))  # fmt: skip
    for entry in report.sweep or []:
        if entry.kl:
            found.append(Point("", _series(entry.latent_cache), entry.share, entry.kl, ratio=entry.ratio, size=True))
    return [*_drawn(found), *originals(report.original_cache, where)]


def points_of_evaluation(evaluation: Evaluation) -> list[Point]:
    """The model that `eval` measured, and the original's quantised caches; none where there are none of these."""
    saved, ratio = evaluation.share_saved, evaluation.ratio
    if saved is None or evaluation.kl is None or ratio is None or evaluation.original_cache is None:
        return []
    suite, error = _suite_kl(evaluation.suite), ratio.value * ratio.error
    cache = evaluation.latent_cache
    name = _named("converted" if evaluation.converted else "model", cache)
    model = Point(name, _series(cache), 1 - saved, evaluation.kl, evaluation.agreement, ratio.value, error, suite, True)
    return [model, *originals(evaluation.original_cache)]


def points_of_sweep(sweep: SweepReport) -> list[Point]:
    """The sizes of a sweep, and the original's quantised caches where they were measured."""
    found = [
        Point(_named(f"{point.rank:g} + {point.rope_dim:g}", point.latent_cache), _series(point.latent_cache), point.share,
              point.evaluation.kl, point.evaluation.agreement, point.ratio, point.stderr,
              _suite_kl(point.evaluation.suite), current=point.name == sweep.chosen, size=True)
        for point in sweep.points if point.evaluation.kl
    ]  # fmt: skip
    section = next((point.original_cache for point in sweep.points if point.original_cache), None)
    return [*_drawn(found), *originals(section)]


def originals(section: OriginalCacheSection | None, where: tuple[str, str] | None = None) -> list[Point]:
    """The original's quantised caches, if they were measured on this text in these windows (None: on any)."""
    if section is None or where not in (None, (section.text, section.protocol)):
        return []
    found = []
    for entry in section.formats:
        suite = entry.suite.kl if entry.suite else None
        found.append(Point(f"original, {words(entry.format)} cache", "original", entry.share, entry.kl, entry.agreement,
                           entry.ratio, entry.ratio * entry.ratio_log_error, suite))  # fmt: skip
    return _drawn(found)


def table(found: Iterable[Point], title: str = "") -> Table:
    """The points with a name, the most bytes first."""
    order = sorted((point for point in found if point.name), key=lambda point: (-point.share, point.kl.value))
    # Standard errors are in report.json and in the chart: a terminal has no room for them.
    rows = [
        (point.name, f"{point.share:.1%}", format.number(point.kl.value, 5),
         format.percent(point.agreement.value if point.agreement else None), format.times(point.ratio, 4, format.NOTHING),
         format.number(point.suite_kl.value if point.suite_kl else None, 5))
        for point in order
    ]  # fmt: skip
    current = next((index for index, point in enumerate(order) if point.current), None)
    return Table(COLUMNS, rows, title, bold=current)


def verdict(found: Iterable[Point]) -> str:
    """Whether a quantised cache of the original is nearer to it than the model is, at equal or fewer bytes; in a sentence."""
    found = list(found)
    model = next((point for point in found if point.current), None)
    caches = [point for point in found if point.series == "original"]
    if model is None or not caches:
        return ""
    own = f"{model.share:.1%} of the bytes at a KL of {format.number(model.kl.value, 5)} nats"
    small = [point for point in caches if point.share <= model.share + EQUAL]
    if not small:
        return f"No quantised cache of the original that was measured is as small as this model's, which has {own}."
    better = sorted((point for point in small if point.kl.value < model.kl.value), key=lambda point: point.kl.value)
    if not better:
        return (
            f"This model has {own}: it is at least as near to the original as every quantised cache of the original that was "
            f"measured at equal or fewer bytes."
        )
    others = ", ".join(f"in {point.short} {point.share:.1%} at {format.number(point.kl.value, 5)}" for point in better)
    return f"This model loses against a flag: it has {own}; the unconverted original has with its cache {others} nats."


def state_of(report: Report) -> list[EarlierState]:
    """The states of a report that is about to be replaced: its earlier ones, and its own where its KL was measured."""
    evaluation, earlier = report.measured, list(report.earlier_states or [])
    if evaluation is None:
        return earlier
    kl = _kl(Measurement(evaluation=evaluation, probes=report.probes), (evaluation.text, evaluation.protocol))
    if kl is None:
        return earlier
    agreement = _agreement(evaluation, report)
    state = EarlierState(
        name="healed" if report.heal else "converted",
        share=1 - report.cache.share_saved,
        text=evaluation.text,
        protocol=evaluation.protocol,
        ratio=evaluation.ratio,
        ratio_log_error=evaluation.ratio_log_error,
        kl=kl,
        **({"latent_cache": report.cache.latent_cache} if report.cache.latent_cache else {}),
        **({"agreement": agreement} if agreement else {}),
        **({"suite_kl": kinds} if (kinds := _suite_kl(evaluation.suite)) else {}),
    )
    return [*earlier, state]


def _earlier(state: EarlierState) -> Point:
    error = state.ratio * state.ratio_log_error
    return Point(_named(state.name, state.latent_cache), _series(state.latent_cache), state.share, state.kl,
                 state.agreement, state.ratio, error, state.suite_kl)  # fmt: skip


def _unhealed(report: Report, where: tuple[str, str]) -> list[Point]:
    """The model before healing, as reports hold it that keep no earlier states."""
    before = report.heal.before if report.heal else None
    if before is None or not isinstance(before.evaluation, EvaluationSection) or not (kl := _kl(before, where)):
        return []
    cache, evaluation = report.cache.latent_cache, before.evaluation
    return [Point(_named("converted", cache), _series(cache), 1 - report.cache.share_saved, kl, None,
                  evaluation.ratio, evaluation.ratio_error, _suite_kl(evaluation.suite))]  # fmt: skip


def _kl(side: Measurement, where: tuple[str, str]) -> Mean | None:
    """KL on the evaluation windows: in the evaluation of a conversion, else among the probes of `eval` and `heal`."""
    evaluation, probe = side.evaluation, side.probes and side.probes.next_token
    if not isinstance(evaluation, EvaluationSection) or (evaluation.text, evaluation.protocol) != where:
        return None
    if evaluation.kl:
        return evaluation.kl
    return probe.kl if probe and (probe.text, probe.protocol) == where else None


def _agreement(evaluation: EvaluationSection, report: Report) -> Mean | None:
    probe = report.probes and report.probes.next_token
    return evaluation.agreement or (probe.agreement if probe else None)


def _suite_kl(suite: SuiteSection | None) -> Mean | None:
    return suite.kl if suite else None


def _named(name: str, cache: JsonObject | None) -> str:
    return f"{name}{format.latent_words(cache)}"


def _series(cache: JsonObject | None) -> Series:
    return "quantised" if cache else "rank"


def _drawn(found: Iterable[Point]) -> list[Point]:
    """The points whose KL is a number."""
    return [point for point in found if math.isfinite(point.kl.value)]
