"""What a model is worth: `eval` loads it, and its original if asked to, and measures both on the same windows of text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mla_convert.core import runtime as environment
from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.progress import Progress
from mla_convert.core.report_file import find_report, finite, look_up
from mla_convert.core.settings import PACKAGE, Settings
from mla_convert.evaluate.quality.perplexity import Mean, Perplexity, Readout, cache_bytes, mean, perplexity, score
from mla_convert.evaluate.quality.probes import ProbeRunner, ProbeSettings
from mla_convert.evaluate.quality.suite import suite_of, suite_section
from mla_convert.source import texts
from mla_convert.source.families import FAMILIES
from mla_convert.source.load_model import PREFIX, find_model, is_converted, load_model, load_tokenizer, model_config
from mla_convert.source.place import SourceLocation
from mla_convert.source.shape import original_cache_bytes
from mla_convert.source.text_files import is_text_name

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Evaluation:
    """Everything that `eval` measured. As a dictionary its figures lie where report.json has them."""

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
    suite: dict[str, Any] | None = None
    dtype: str = ""
    device: str = ""
    seconds: float = 0.0
    beyond: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def share_saved(self) -> float | None:
        """Share of the original's cache that is saved."""
        return None if not self.bytes_before else 1 - self.bytes_after / self.bytes_before

    def as_dict(self) -> dict[str, Any]:
        """`cache` and `evaluation` as in report.json, and more; NaN and infinity as null."""
        return finite(
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
                    "before": self.before and self.before.as_dict(),
                    "after": self.after.as_dict(),
                    "ratio": self.ratio and self.ratio.value,
                    "ratio_log_error": self.ratio and self.ratio.error,
                    "kl": self.kl and asdict(self.kl),
                    "agreement": self.agreement and asdict(self.agreement),
                    **({"suite": self.suite} if self.suite else {}),
                },
                "beyond": self.beyond,
                "dtype": self.dtype,
                "device": self.device,
                "versions": environment.versions(),
                "seconds": self.seconds,
                "notes": self.notes,
            }
        )


def load_eval_windows(
    spec: str | None, tokenizer: Any, count: int | None, length: int | None, model: texts.Reach, report: dict[str, Any]
) -> tuple[Tensor, str, list[str]]:
    """Evaluation windows (n, L), the label of their text, and notes about what was chosen for the user.

    What is not given is as in the model's report, so that the windows are those of its conversion, and as in a
    conversion's defaults where there is no report.

    Raises:
        InputError, ResourceError: as `texts.load_text` and `texts.evaluation_windows`.
    """
    count = count or _setting(report, "eval_windows", 1) or Settings.model_fields["eval_windows"].default
    length = length or _setting(report, "eval_length", 2)
    chosen, why = (spec, "") if spec else _text_of(report)
    text, label = texts.load_text(chosen, "evaluation")
    notes = [*([f"{why}: using {label}"] if why else []), *model.note(length, "--eval-length")]
    windows = texts.evaluation_windows(text, tokenizer, count, model.length(length, texts.EVAL_LENGTH), label)
    return model.check(windows, label), label, notes


def _setting(report: dict[str, Any], name: str, least: int) -> int | None:
    """A number among a report's settings; None where it has none that makes sense."""
    found = look_up(report, f"settings.{name}")
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= least else None


def _text_of(report: dict[str, Any]) -> tuple[str | None, str]:
    """The text that a report was measured on, as `--eval` takes it, and why it was chosen. Reports hold no paths."""
    label, why = look_up(report, "settings.eval"), "no evaluation text was given"
    if not isinstance(label, str) or label in ("", texts.NONE):
        return None, why
    if PACKAGE + label in texts.SHIPPED.values():
        return PACKAGE + label, why
    if is_text_name(label) or "/" not in label:
        return None, f"{why}, and of the conversion's only the name is known ({label})"
    return label, why


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
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model: a folder, Hub id, `.gguf` file or recipe; with `against`, also its distance from that original.

    `text`, `windows` and `length` choose the evaluation windows (see `load_eval_windows`); `suite_windows` are those of each
    kind of the packaged suite (0: none; None: as in the model's report, or a few). Both models run in one `dtype`:
    the one that `model` is stored in unless another is given. One decoder is in memory at a time. `probes` are what else to
    measure, of both.

    Raises:
        UsageError: no such dtype or device, windows out of range, or a probe that lacks the original or its extra.
        InputError: a model or text that cannot be used, or two models that do not share a tokenizer.
        ResourceError: the Hub or the device is not there.
    """
    began, progress = time.perf_counter(), progress or Progress()
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known: give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if (windows is not None and windows < 1) or (length is not None and length < 2):
        raise UsageError("at least 1 window of 2 tokens is needed: see --eval-windows and --eval-length")
    probes = probes or ProbeSettings()
    if probes.greedy and not against:
        raise UsageError("--greedy compares with an original: give --against")
    where = environment.pick_device(device)
    place = find_model(model)
    origin = find_model(against) if isinstance(against, str) else against
    config, tokenizer = model_config(place), load_tokenizer(place)
    converted, limit = is_converted(config), getattr(config, "max_position_embeddings", None)
    report = find_report(place.folder) if converted else {}
    learned = not getattr(FAMILIES.get(config.model_type.removeprefix(PREFIX)), "rotary", True)
    reach = texts.reach(config, learned)
    chosen, label, notes = load_eval_windows(text, tokenizer, windows, length, reach, report)
    kinds_of = suite_of(tokenizer, suite_windows, where.type == "cuda", chosen, report)
    read = [*chosen, *(kinds_of.windows if kinds_of else [])]
    if kinds_of:
        reach.check(kinds_of.windows, "the packaged suite")
    if origin:
        _check_same_tokenizer(chosen, tokenizer, origin)
    for note in notes:
        progress.note(note)
    prober = ProbeRunner(probes, tokenizer, chosen, limit, progress)

    loaded = _load(place, dtype if dtype == "auto" else getattr(torch, dtype), where, progress)
    stored, itemsize, after = loaded.dtype, loaded.dtype.itemsize, cache_bytes(loaded, chosen[0])
    ours = Readout(loaded, read, _ticker(progress, place.label))
    probed, reference = prober.run(loaded, partial(_ticker, progress, place.label)), None
    del loaded
    before, theirs = original_cache_bytes(config, itemsize) if converted else None, None
    if origin:
        loaded = _load(origin, stored, where, progress)
        before = cache_bytes(loaded, chosen[0])
        theirs = Readout(loaded, read, _ticker(progress, origin.label))
        reference = prober.run(loaded, partial(_ticker, progress, origin.label))
        del loaded
    scores = score(ours, chosen, theirs)
    by_kind = kinds_of and suite_section(kinds_of, score(ours, kinds_of.windows, theirs, first=len(chosen)))
    where_from = {"text": label, "protocol": texts.evaluation_protocol(chosen)}
    ran_on = {"dtype": str(stored).removeprefix("torch."), "device": environment.device_name(where)}
    beyond = {key: {**where_from, **part} if key == "greedy" else part
              for key, part in prober.summary(reference, probed).items()}  # fmt: skip
    compared = {}
    if origin:
        paired = mean(scores.losses - scores.original)
        compared = {"before": perplexity(scores.original), "kl": mean(scores.kl), "agreement": mean(scores.agreement),
                    "ratio": Mean(math.exp(min(paired.value, 700.0)), paired.error)}  # fmt: skip
        beyond = {"next_token": {**where_from, **{key: asdict(compared[key]) for key in ("kl", "agreement")}}, **beyond}
    return Evaluation(
        model=place.label,
        converted=converted,
        against=origin.label if origin else None,
        **where_from,
        **ran_on,
        after=perplexity(scores.losses),
        suite=by_kind,
        bytes_after=after,
        bytes_before=before,
        before_is_measured=origin is not None,
        beyond={key: {"against": origin and origin.label, **part, **ran_on} for key, part in beyond.items()},
        seconds=round(time.perf_counter() - began, 2),
        notes=notes,
        **compared,
    )


def _load(place: SourceLocation, dtype: str | torch.dtype, device: torch.device, progress: Progress) -> nn.Module:
    progress.note(f"loading {place.label}")
    return load_model(place, dtype, device)


def _ticker(progress: Progress, label: str, what: str = "window") -> Callable[[int, int], None]:
    """Says every ten seconds how many windows (or of what else) are done."""
    shown = [time.perf_counter()]

    def tick(done: int, count: int) -> None:
        if time.perf_counter() - shown[0] > 10:
            shown[0] = time.perf_counter()
            progress.note(f"{label}: {what} {done}/{count}")

    return tick


def _check_same_tokenizer(windows: Tensor, tokenizer: Any, origin: SourceLocation) -> None:
    """Perplexities compare only over the same tokens: both tokenizers must make the same of the text's beginning."""
    size = getattr(model_config(origin), "vocab_size", math.inf)
    if int(windows.max()) >= size:
        raise InputError(f"{origin.label} has a vocabulary of {size} tokens, fewer than the model's: not its original")
    sample = tokenizer.decode(windows[0][:256], skip_special_tokens=True)
    ids = [t(sample, add_special_tokens=True, verbose=False)["input_ids"] for t in (tokenizer, load_tokenizer(origin))]
    if ids[0] != ids[1]:
        raise InputError(f"{origin.label} has another tokenizer than the model: it is not the model's original")
