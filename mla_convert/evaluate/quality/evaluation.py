"""`eval`: loads a model, and its original if there is one, and measures both on the same windows of text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mla_convert.core import runtime
from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.progress import Progress
from mla_convert.core.report_file import find_content, look_up
from mla_convert.core.report_schema import (
    JsonObject,
    Mean,
    NextToken,
    OriginalCacheEntry,
    OriginalCacheSection,
    Perplexity,
    ProbesSection,
    SuiteSection,
    to_json,
)
from mla_convert.core.settings import PACKAGE, Settings
from mla_convert.evaluate.quality.original_cache import check_loaded, measure_loaded
from mla_convert.evaluate.quality.perplexity import Readout, cache_bytes, mean, perplexity, ratio, score
from mla_convert.evaluate.quality.probes import ProbeOutputs, ProbeRunner, ProbeSettings
from mla_convert.evaluate.quality.suite import Suite, suite_of, suite_section
from mla_convert.source import texts
from mla_convert.source.families import FAMILIES
from mla_convert.source.load_model import PREFIX, find_model, is_converted, load_model, load_tokenizer, model_config
from mla_convert.source.place import SourceLocation
from mla_convert.source.shape import original_cache_bytes
from mla_convert.source.text_files import is_text_name

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Evaluation:
    """The result of `eval`. As a dictionary its values have the paths that they have in report.json.

    Attributes:
        model: name of the model.
        converted: whether it is a converted model.
        latent_cache: format of its cache in config.json, if that is quantised.
        against: name of the original, if there was one.
        text: label of the evaluation text.
        protocol: the evaluation windows in words.
        after: perplexity of the model.
        bytes_after: bytes that a token takes in the model's cache.
        bytes_before: bytes that a token takes in the original's cache, if they are known.
        before_is_measured: whether `bytes_before` was measured; otherwise it is computed from config.json.
        before: perplexity of the original.
        ratio: `after` over `before`; its error is the standard error of its logarithm.
        kl: KL(original ‖ model) of the next token in nats.
        agreement: share of tokens with the same most likely next token.
        suite: results on the packaged suite.
        original_cache: the original with quantised caches of its own.
        dtype: dtype of both models.
        device: name of the device.
        seconds: time of the evaluation.
        probes: results of the quality probes.
        notes: what a reader should know.
    """

    model: str
    converted: bool
    against: str | None
    text: str
    protocol: str
    after: Perplexity
    bytes_after: float
    bytes_before: float | None
    before_is_measured: bool
    before: Perplexity | None = None
    ratio: Mean | None = None
    kl: Mean | None = None
    agreement: Mean | None = None
    suite: SuiteSection | None = None
    original_cache: OriginalCacheSection | None = None
    dtype: str = ""
    device: str = ""
    seconds: float = 0.0
    probes: ProbesSection = field(default_factory=ProbesSection)
    notes: list[str] = field(default_factory=list)
    latent_cache: JsonObject | None = None

    @property
    def share_saved(self) -> float | None:
        """Share of the original's cache that is saved."""
        return None if not self.bytes_before else 1 - self.bytes_after / self.bytes_before

    def as_dict(self) -> JsonObject:
        """For `eval --json`: `cache` and `evaluation` as in report.json, and more; NaN and infinity as null."""
        return to_json(
            {
                "model": self.model,
                "converted": self.converted,
                "against": self.against,
                "cache": {
                    "bytes_per_token": {"before": self.bytes_before, "after": self.bytes_after},
                    "before_is_measured": self.before_is_measured,
                    "share_saved": self.share_saved,
                },
                "evaluation": {
                    "text": self.text,
                    "protocol": self.protocol,
                    "before": self.before,
                    "after": self.after,
                    "ratio": self.ratio and self.ratio.value,
                    "ratio_log_error": self.ratio and self.ratio.error,
                    "kl": self.kl,
                    "agreement": self.agreement,
                    **({"suite": self.suite} if self.suite else {}),
                },
                **({"original_cache": self.original_cache} if self.original_cache else {}),
                "probes": self.probes,
                "dtype": self.dtype,
                "device": self.device,
                "versions": runtime.versions(),
                "seconds": self.seconds,
                "notes": self.notes,
            }
        )


def load_eval_windows(
    spec: str | None, tokenizer: Any, count: int | None, length: int | None, model: texts.Reach, report: JsonObject
) -> tuple[Tensor, str, list[str]]:
    """Evaluation windows (n, L), the label of their text, and notes about what was chosen for the user.

    Args:
        spec: the text, as `--eval` takes it; None: the conversion's, if the report names one that can be found.
        tokenizer: of the model.
        count: number of windows at most; None: the conversion's, else the default of a conversion.
        length: tokens in a window; None: as for `count`.
        model: the limits of the model's context.
        report: content of the model's report.json, or an empty object.

    Raises:
        InputError: as `texts.load_text` and `texts.evaluation_windows`.
        ResourceError: as `texts.load_text`.
    """
    # As the conversion measured, so that its figures can be compared. A window of one token has nothing to predict.
    count = count or _setting(report, "eval_windows", 1) or Settings.model_fields["eval_windows"].default
    length = length or _setting(report, "eval_length", 2)
    chosen, why = (spec, "") if spec else _text_of(report)
    text, label = texts.load_text(chosen, "evaluation", tokenizer)
    notes = [*([f"{why}: using {label}"] if why else []), *model.note(length, "--eval-length")]
    windows = texts.evaluation_windows(text, tokenizer, count, model.length(length, texts.EVAL_LENGTH), label)
    return model.check(windows, label), label, notes


def _setting(report: JsonObject, name: str, least: int) -> int | None:
    """A whole number of at least `least` among a report's settings, or None."""
    value = look_up(report, f"settings.{name}")
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= least else None


def _text_of(report: JsonObject) -> tuple[str | None, str]:
    """The evaluation text that a report names, as `--eval` takes it, and why it was chosen. Reports hold no paths."""
    label, why = look_up(report, "settings.eval"), "no evaluation text was given"
    if not isinstance(label, str) or label in ("", texts.NONE):
        return None, why
    # A report names packaged texts without their prefix.
    if PACKAGE + label in texts.SHIPPED.values():
        return PACKAGE + label, why
    # A file of this name may be there, but nothing says that it is the same text.
    if is_text_name(label) or "/" not in label:
        return None, f"{why}, and of the conversion's only the name is known ({label})"
    return label, why


@dataclass(frozen=True)
class _Request:
    """The arguments of `evaluate_model` that choose texts and probes."""

    text: str | None
    windows: int | None
    length: int | None
    suite_windows: int | None
    probes: ProbeSettings


@dataclass(frozen=True)
class _Material:
    """The texts that both models read, and the probes that both run.

    Attributes:
        windows: evaluation windows (n, L).
        text: label of the evaluation text.
        suite: the packaged suite, if it is measured.
        prober: the probes with their prompts.
        notes: about what was chosen for the user.
    """

    windows: Tensor
    text: str
    suite: Suite | None
    prober: ProbeRunner
    notes: list[str]

    @property
    def where(self) -> dict[str, str]:
        """Text and protocol, as a report names them."""
        return {"text": self.text, "protocol": texts.evaluation_protocol(self.windows)}

    @property
    def every(self) -> list[Tensor]:
        """The evaluation windows, then those of the suite."""
        return [*self.windows, *(self.suite.windows if self.suite else [])]


@dataclass(frozen=True)
class _Reading:
    """Results that outlive a freed model: its readout, the bytes of its cache per token, its probes, its dtype."""

    readout: Readout
    cache_bytes: float
    probes: ProbeOutputs
    dtype: torch.dtype
    original_cache: list[OriginalCacheEntry]


def evaluate_model(
    model: str,
    against: str | SourceLocation | None = None,
    *,
    text: str | None = None,
    windows: int | None = None,
    length: int | None = None,
    suite_windows: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    probes: ProbeSettings | None = None,
    original_cache: Sequence[str] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model, and its distance from an original. One model is in memory at a time.

    Args:
        model: a folder, Hub id, `.gguf` file or recipe.
        against: the original, named like `model`.
        text: the evaluation text (see `load_eval_windows`).
        windows: number of evaluation windows at most.
        length: tokens in an evaluation window.
        suite_windows: windows of each kind of the packaged suite; 0: none; None: as in the model's report, or a few.
        dtype: of both models; "auto": the one that `model` is stored in.
        device: where both run.
        probes: quality probes to run on both.
        original_cache: formats in which the original's own cache is quantised and measured too (core/original_cache.py).
        progress: takes notes.

    Raises:
        UsageError: no such dtype or device, windows out of range, or a probe or format that lacks the original or its extra.
        InputError: a model or text that cannot be used, or two models that do not share a tokenizer.
        ResourceError: the Hub or the device is not there.
    """
    began, progress = time.perf_counter(), progress or Progress()
    probes = probes or ProbeSettings()
    _check_request(dtype, windows, length, probes, against)
    if original_cache and against is None:
        raise UsageError("original_cache quantises the cache of an original: give against")
    where = runtime.pick_device(device)
    place = find_model(model)
    origin = find_model(against) if isinstance(against, str) else against
    request = _Request(text, windows, length, suite_windows, probes)
    # Texts and prompts before any model: the errors of the cheap part come first.
    material = _load_material(place, origin, request, where, progress)
    reading = _read(place, dtype if dtype == "auto" else getattr(torch, dtype), where, material, progress)
    # In the dtype of the converted model, or the ratio would contain the rounding of another one.
    reference = _read(origin, reading.dtype, where, material, progress, original_cache) if origin else None
    config = model_config(place)
    converted = is_converted(config)
    computed = original_cache_bytes(config, reading.dtype.itemsize) if converted else None
    ran_on = {"dtype": str(reading.dtype).removeprefix("torch."), "device": runtime.device_name(where)}
    scores = _scores(material, reading, reference)
    return Evaluation(
        model=place.label,
        converted=converted,
        latent_cache=getattr(config.get_text_config(), "latent_cache", None) if converted else None,
        against=origin.label if origin else None,
        **material.where,
        **ran_on,
        **scores,
        bytes_after=reading.cache_bytes,
        bytes_before=reference.cache_bytes if reference else computed,
        before_is_measured=reference is not None,
        original_cache=_section(reference, {**material.where, **ran_on}),
        probes=_probes(material, reading, reference, scores, {"against": origin and origin.label, **ran_on}),
        seconds=round(time.perf_counter() - began, 2),
        notes=material.notes,
    )


def _check_request(
    dtype: str, windows: int | None, length: int | None, probes: ProbeSettings, against: str | SourceLocation | None
) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known: give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if (windows is not None and windows < 1) or (length is not None and length < 2):
        raise UsageError("at least 1 window of 2 tokens is needed: see --eval-windows and --eval-length")
    if probes.greedy and not against:
        raise UsageError("--greedy compares with an original: give --against")


def _load_material(
    place: SourceLocation, origin: SourceLocation | None, request: _Request, device: torch.device, progress: Progress
) -> _Material:
    config, tokenizer = model_config(place), load_tokenizer(place)
    report = find_content(place.folder) if is_converted(config) else {}
    # Learned positions end where their embedding does; RoPE can go on behind the model's context.
    learned = not getattr(FAMILIES.get(config.model_type.removeprefix(PREFIX)), "rotary", True)
    reach = texts.reach(config, learned)
    windows, label, notes = load_eval_windows(request.text, tokenizer, request.windows, request.length, reach, report)
    suite = suite_of(tokenizer, request.suite_windows, device.type == "cuda", windows, report)
    if suite:
        reach.check(suite.windows, "the packaged suite")
    if origin:
        _check_same_tokenizer(windows, tokenizer, origin)
    for note in notes:
        progress.note(note)
    limit = getattr(config, "max_position_embeddings", None)
    prober = ProbeRunner(request.probes, tokenizer, windows, limit, progress)
    return _Material(windows, label, suite, prober, notes)


def _read(
    place: SourceLocation,
    dtype: str | torch.dtype,
    device: torch.device,
    material: _Material,
    progress: Progress,
    original_cache: Sequence[str] = (),
) -> _Reading:
    """Load a model, run it on everything, and free it on return; an original also with quantised caches."""
    progress.note(f"loading {place.label}")
    model, tick = load_model(place, dtype, device), _ticker(progress, place.label)
    # First, because a model that keeps no cache is refused before it reads all windows.
    size = cache_bytes(model, material.windows[0])
    if original_cache:
        check_loaded(model, material.windows[0], place.label)
    readout = Readout(model, material.every, tick)
    return _Reading(
        cache_bytes=size,
        readout=readout,
        probes=material.prober.run(model, partial(_ticker, progress, place.label)),
        dtype=model.dtype,
        original_cache=measure_loaded(model, original_cache, readout, material.windows, material.suite, tick),
    )


def _section(reference: _Reading | None, conditions: JsonObject) -> OriginalCacheSection | None:
    """The original's quantised caches with the conditions of their measurement; None where none was measured."""
    if reference is None or not reference.original_cache:
        return None
    return OriginalCacheSection(**conditions, formats=reference.original_cache)


def _scores(material: _Material, reading: _Reading, reference: _Reading | None) -> JsonObject:
    """The entries of an `Evaluation` that come from token losses."""
    original = reference.readout if reference else None
    scores = score(reading.readout, material.windows, original)
    entries: JsonObject = {"after": perplexity(scores.losses)}
    if material.suite:
        # The suite's windows follow those of the evaluation in `_Material.every`.
        first = len(material.windows)
        entries["suite"] = suite_section(
            material.suite, score(reading.readout, material.suite.windows, original, first=first)
        )
    if scores.original is not None:
        entries |= {
            "before": perplexity(scores.original),
            "ratio": ratio(scores.losses, scores.original),
            "kl": mean(scores.kl),
            "agreement": mean(scores.agreement),
        }
    return entries


def _probes(
    material: _Material, reading: _Reading, reference: _Reading | None, scores: JsonObject, conditions: JsonObject
) -> ProbesSection:
    """Results of all probes, with the `conditions` of the measurement in each."""
    section = material.prober.summary(reference and reference.probes, reading.probes, **material.where)
    if reference:
        section.next_token = NextToken(**material.where, kl=scores["kl"], agreement=scores["agreement"])
    for probe in section.entries().values():
        for name, value in conditions.items():
            setattr(probe, name, value)
    return section


def _ticker(progress: Progress, label: str, what: str = "window") -> Callable[[int, int], None]:
    """A function that notes the number of units done every ten seconds."""
    shown = [time.perf_counter()]

    def tick(done: int, count: int) -> None:
        if time.perf_counter() - shown[0] > 10:
            shown[0] = time.perf_counter()
            progress.note(f"{label}: {what} {done}/{count}")

    return tick


def _check_same_tokenizer(windows: Tensor, tokenizer: Any, origin: SourceLocation) -> None:
    """Refuse two tokenizers that differ on the beginning of the text: perplexities compare only over the same tokens."""
    size = getattr(model_config(origin), "vocab_size", math.inf)
    # An id without an embedding is an index error on the CPU and a failed assertion of the device on CUDA, after which
    # no call succeeds.
    if int(windows.max()) >= size:
        raise InputError(f"{origin.label} has a vocabulary of {size} tokens, fewer than the model's: not its original")
    sample = tokenizer.decode(windows[0][:256], skip_special_tokens=True)
    ids = [t(sample, add_special_tokens=True, verbose=False)["input_ids"] for t in (tokenizer, load_tokenizer(origin))]
    if ids[0] != ids[1]:
        raise InputError(f"{origin.label} has another tokenizer than the model: it is not the model's original")
