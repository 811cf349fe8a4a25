"""Sections of report.json on perplexity: the evaluation text, the held-out text and the packaged suite."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Discriminator, PlainValidator, Tag, WithJsonSchema

from mla_convert.core.original_cache import NAMES
from mla_convert.core.report_schema.base import Amount, Count, JsonObject, Measured, Section

LONGEST_NAME = 32


def _kind_name(value: object) -> str:
    """The name of a kind of text. Pages and cards show it as it is, so it is letters alone."""
    if isinstance(value, str) and value.isalpha() and value.islower() and len(value) <= LONGEST_NAME:
        return value
    raise ValueError("should be a word in small letters")


KindName = Annotated[
    str,
    PlainValidator(_kind_name),
    WithJsonSchema({"type": "string", "pattern": "^[a-z]+$", "maxLength": LONGEST_NAME}),
]


def _format_name(value: object) -> str:
    """The name of a cache's format. Pages and cards show it, so that it is one that this version knows."""
    if value in NAMES:
        return str(value)
    raise ValueError(f"should be one of {', '.join(NAMES)}")


FormatLabel = Annotated[str, PlainValidator(_format_name), WithJsonSchema({"enum": list(NAMES)})]


class Perplexity(Section):
    """A perplexity.

    Attributes:
        value: exp of the mean negative log-likelihood of a token.
        log_error: standard error of its logarithm over windows; NaN for one window.
        windows: number of windows of text.
        length: tokens in a window.
    """

    value: Measured
    log_error: Measured = math.nan
    windows: Count | None = None
    length: Count | None = None


class Mean(Section):
    """A mean over tokens, prompts or examples, and its standard error; NaN where there is a single one."""

    value: Measured = math.nan
    error: Measured = math.nan


class Divergence(Mean):
    """KL(original ‖ converted) of the next token in nats: its mean, and its 99th percentile over tokens."""

    p99: Measured = math.nan


class Comparison(Section):
    """Perplexity of the original (`before`) and of the converted model (`after`) on the same windows of one text.

    Attributes:
        text: label of the text; a report holds no paths.
        protocol: the windows in words.
        before: perplexity of the original.
        after: perplexity of the converted model.
        ratio: `after` over `before`.
        ratio_log_error: standard error of the ratio's logarithm over windows, paired.
    """

    text: str
    protocol: str
    before: Perplexity
    after: Perplexity
    ratio: Measured
    ratio_log_error: Measured = math.nan

    @property
    def ratio_error(self) -> float:
        """Standard error of the ratio over windows; NaN for a single window and in reports without it."""
        return self.ratio * self.ratio_log_error


class KindEntry(Section):
    """One kind of text of the packaged suite; without an original only `after` is known."""

    before: Perplexity | None = None
    after: Perplexity
    ratio: Measured = math.nan
    ratio_log_error: Measured = math.nan
    kl: Divergence | None = None
    agreement: Mean | None = None


class WorstKind(Section):
    """The kind of text whose perplexity grew most."""

    kind: KindName
    ratio: Measured = math.nan


class SuiteSection(Section):
    """The packaged suite. `kl` and `agreement` are means of the kinds' own means."""

    protocol: str
    windows: Count | None = None
    length: Count | None = None
    kinds: dict[KindName, KindEntry]
    worst: WorstKind | None = None
    kl: Mean | None = None
    agreement: Mean | None = None


class EvaluationSection(Comparison):
    """Results on the evaluation text, the held-out text and the packaged suite."""

    kl: Mean | None = None
    agreement: Mean | None = None
    held_out: Comparison | None = None
    suite: SuiteSection | None = None


class OriginalCacheEntry(Section):
    """The original with its own keys and values quantised in its cache, against itself without that.

    Attributes:
        format: of the cache, as `--original-cache` takes it.
        share: bytes over those of the original's own cache, with scales and zero points.
        after: perplexity with this cache.
        ratio: `after` over the original's perplexity.
        ratio_log_error: standard error of the ratio's logarithm over windows, paired.
        kl: KL(original ‖ original with this cache) of the next token in nats.
        agreement: share of tokens with the same most likely next token.
        suite: the packaged suite.
    """

    format: FormatLabel
    share: Amount
    after: Perplexity | None = None
    ratio: Measured = math.nan
    ratio_log_error: Measured = math.nan
    kl: Mean
    agreement: Mean | None = None
    suite: SuiteSection | None = None


class OriginalCacheSection(Section):
    """Quantised caches of the original, measured as the converted model was.

    Attributes:
        text: label of the evaluation text.
        protocol: the windows in words.
        dtype: dtype of the original's weights.
        device: name of the device.
        formats: one entry a format.
    """

    text: str
    protocol: str
    dtype: str | None = None
    device: str | None = None
    formats: list[OriginalCacheEntry]


class EarlierState(Section):
    """A state of the model that `heal` or `quantize` has replaced.

    Attributes:
        name: of the state: converted or healed.
        share: bytes of its cache over those of the original's.
        latent_cache: format of its cache, as config.json held it; null for a cache of numbers.
        text: label of the evaluation text.
        protocol: the windows in words.
        ratio: perplexity over the original's.
        ratio_log_error: standard error of the ratio's logarithm over windows, paired.
        kl: KL(original ‖ model) of the next token in nats.
        agreement: share of tokens with the same most likely next token.
        suite_kl: mean KL over the packaged suite's kinds of text.
    """

    name: Literal["converted", "healed"]
    share: Amount
    latent_cache: JsonObject | None = None
    text: str
    protocol: str
    ratio: Measured = math.nan
    ratio_log_error: Measured = math.nan
    kl: Mean
    agreement: Mean | None = None
    suite_kl: Mean | None = None


class NotEvaluated(Section):
    """The evaluation of a conversion with `--eval none`."""

    skipped: Literal[True] = True
    text: None = None
    protocol: None = None
    before: None = None
    after: None = None
    ratio: None = None
    ratio_log_error: None = None

    @classmethod
    def section(cls) -> NotEvaluated:
        """With every entry, so that all of them are in the file."""
        return cls.model_validate({**dict.fromkeys(cls.model_fields), "skipped": True})


def _form(value: object) -> str:
    if isinstance(value, NotEvaluated) or (isinstance(value, dict) and value.get("skipped")):
        return "skipped"
    return "evaluated"


# With a discriminator an error names the entry that is wrong in the form at hand; a plain union would report both
# forms.
Evaluation = Annotated[
    Annotated[EvaluationSection, Tag("evaluated")] | Annotated[NotEvaluated, Tag("skipped")], Discriminator(_form)
]
