"""Calibration and evaluation text, from a file, a `datasets` name, the default data set or the package, cut into windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mla_convert.core.errors import InputError, ResourceError, UsageError
from mla_convert.core.settings import PACKAGE, ConvertConfig, packaged
from mla_convert.core.words import expanded, plain
from mla_convert.source import hub_mixture, mixture
from mla_convert.source.data_sets import open_named, strings
from mla_convert.source.text_files import is_text_name, read_documents
from mla_convert.source.tokens import noised
from mla_convert.source.windows import PIECE, evaluation_protocol, evaluation_windows, mixed_windows

WIKITEXT = "Salesforce/wikitext:"
DEFAULT_DATASET = f"{WIKITEXT}wikitext-2-raw-v1"
SHIPPED = {"calibration": "package:mla_demo/calibration.txt.gz", "evaluation": "package:mla_demo/evaluation.txt.gz"}
SPLITS = {"calibration": "train", "evaluation": "test"}
# Windows and tokens per window, by whether there is a GPU.
CALIB_DEFAULT = {True: (2048, 1024), False: (32, 512)}
# On a GPU, WIDTH_WINDOWS / hidden_size windows, at least LEAST_ON_GPU: their hidden states then have one size in memory.
WIDTH_WINDOWS, LEAST_ON_GPU = 1 << 20, 256
# Windows that suffice if the text has no more and no number was given.
FEWEST = 32
EVAL_LENGTH = 2048
# As an evaluation text: no evaluation.
NONE = "none"
# As a held-out text: the last part of the calibration text, which calibration then does not use.
FROM_CALIB, CALIB_SHARE = "calib", 0.9


@dataclass(frozen=True)
class Windows:
    """Token windows (N, L) of all texts, the texts' labels, and notes about defaults that were used.

    `held_out`: windows for the choice of settings, of the evaluation windows' length, so that the choice does not use the
    evaluation text. If not `evaluated`, `evaluation` is a window of the calibration text and must not be reported.
    """

    calib: Tensor
    evaluation: Tensor
    calib_text: str
    eval_text: str
    notes: list[str]
    held_out: Tensor | None = None
    held_out_text: str | None = None
    evaluated: bool = True
    calib_counts: dict[str, int] | None = None
    """Windows of each calibration text, by its label."""

    @property
    def measured(self) -> Tensor:
        """All windows for perplexity: those of the evaluation, then the held-out ones."""
        return self.evaluation if self.held_out is None else torch.cat([self.evaluation, self.held_out])

    def labels(self, config: ConvertConfig) -> dict[str, Any]:
        """The texts that were given, by their labels in reports, which contain no paths."""
        healed = [
            replace(part, spec=repeatable(part.spec, "", "")[0]) for part in mixture.parts(config.heal_data, "training")
        ]
        return {"calib": config.calib and self.calib_text, "eval": config.eval and self.eval_text,
                "held_out": config.held_out and self.held_out_text,
                "heal_data": config.heal_data and ", ".join(map(str, healed))}  # fmt: skip

    def calib_protocol(self, generated: int = 0) -> str:
        """All calibration windows in words; `generated`: those among them that the model generates itself."""
        return f"{self.calib_text}, {len(self.calib) + generated} windows of {self.calib.shape[1]} tokens"

    @property
    def eval_protocol(self) -> str:
        """The evaluation windows in words."""
        return evaluation_protocol(self.evaluation)


@dataclass(frozen=True)
class Reach:
    """Limits of a model's input: windows of `longest` tokens (None: no limit) and tokens below `vocabulary`.

    `learned`: the model has an embedding for each position, so there is none from `longest` on.
    """

    longest: int | None = None
    learned: bool = False
    vocabulary: int | None = None

    def length(self, given: int | None, default: int) -> int:
        """Tokens of a window: the given number or the default, at most the number of positions."""
        if given is None:
            return min(default, self.longest or default)
        # RoPE goes on beyond the longest window; a learned position that does not exist has no embedding.
        return min(given, self.longest) if self.learned and self.longest else given

    def note(self, given: int | None, option: str) -> list[str]:
        """A note if the windows are shorter than `option` requires."""
        if given is None or self.length(given, given) == given:
            return []
        return [f"the model has learned {self.longest} positions: windows are so long, not {option} {given}"]

    def check(self, windows: Tensor, label: str) -> Tensor:
        """Return the windows, if the model has an embedding for each of their tokens.

        Raises:
            InputError: names a token without one.
        """
        most = int(windows.max())
        if self.vocabulary is not None and most >= self.vocabulary:
            raise InputError(
                f"the tokenizer makes token {most} of {label}, and the model's embedding has {self.vocabulary} rows: "
                f"tokenizer and weights do not belong together"
            )
        return windows


def reach(config: Any, learned: bool) -> Reach:
    """The limits of the model that a configuration describes; `learned`: it has learned positions instead of RoPE."""
    return Reach(getattr(config, "max_position_embeddings", None), learned, getattr(config, "vocab_size", None))


def calibration_size(config: ConvertConfig, on_gpu: bool, hidden: int, model: Reach = Reach()) -> tuple[int, int]:
    """Calibration windows and tokens per window; `hidden` is the width of the model's residual stream."""
    samples, length = CALIB_DEFAULT[on_gpu]
    if on_gpu:
        samples = min(samples, max(LEAST_ON_GPU, WIDTH_WINDOWS // hidden))
    return config.calib_samples or samples, model.length(config.calib_length, length)


def evaluation_length(config: ConvertConfig, model: Reach) -> int:
    """Tokens of an evaluation window."""
    return model.length(config.eval_length, EVAL_LENGTH)


def load_windows(
    config: ConvertConfig, tokenizer: Any, on_gpu: bool, model: Reach, hidden: int, self_generated: float = 0.0
) -> Windows:
    """All texts of a conversion, cut into windows.

    Args:
        config: names the texts and the numbers of windows.
        tokenizer: of the model.
        on_gpu: selects the defaults.
        model: limits of the model's input.
        hidden: width of the model's residual stream.
        self_generated: fraction of the calibration windows that do not come from the texts.

    Raises:
        InputError: an unusable text, or a tokenizer of another model.
    """
    samples, length = calibration_size(config, on_gpu, hidden, model)
    samples = max(1, samples - round(samples * self_generated))
    # What the texts lack is self-generated too, where that fraction was not set. A budget's windows are the most that may be
    # used, not a number that a user wants.
    filled = config.budget or (self_generated and config.calib_self_generated is None)
    fewest = samples if config.calib_samples and not filled else min(samples, FEWEST)
    eval_length = evaluation_length(config, model)
    given = mixture.parts(config.calib)
    loaded = [load_text(part.spec, "calibration", tokenizer) for part in given]
    calib_texts, labels = [text for text, _ in loaded], [label for _, label in loaded]
    calib_label = mixture.label(labels, given) if config.calib else mixture.PACKAGED_LABEL
    evaluated = config.eval != NONE
    eval_text, eval_label = load_text(config.eval, "evaluation", tokenizer) if evaluated else ("", NONE)
    held_out, held_out_label = None, None
    if config.held_out == FROM_CALIB:
        # The texts are cut before windows are drawn, so that no window spans both parts.
        cuts = [int(len(text) * CALIB_SHARE) for text in calib_texts]
        rest = "\n\n".join(text[cut:] for text, cut in zip(calib_texts, cuts, strict=True))
        calib_texts = [text[:cut] for text, cut in zip(calib_texts, cuts, strict=True)]
        held_out_label = f"the end of {calib_label}"
    elif config.held_out:
        rest, held_out_label = load_text(config.held_out, "held-out", tokenizer)
    if held_out_label:
        held_out = evaluation_windows(rest, tokenizer, config.eval_windows, eval_length, held_out_label, "held-out")
        model.check(held_out, held_out_label)
    stood_in = {"calibration": (config.calib, calib_label), "evaluation": (config.eval, eval_label)}
    weighted = [(text, label, part.weight) for text, label, part in zip(calib_texts, labels, given, strict=True)]
    calib, counts = mixed_windows(weighted, tokenizer, samples, length, config.seed, fewest)
    model.check(calib, calib_label)
    evaluation = calib[:1]  # shows at least whether the model's results are finite
    if evaluated:
        evaluation = evaluation_windows(eval_text, tokenizer, config.eval_windows, eval_length, eval_label)
    notes = [f"no {purpose} text was given: using {label}" for purpose, (spec, label) in stood_in.items() if not spec]
    notes += model.note(config.calib_length, "--calib-length") + model.note(config.eval_length, "--eval-length")
    return Windows(
        calib=noised(calib, config.calib_noise, tokenizer, config.seed, model.vocabulary),
        evaluation=model.check(evaluation, eval_label),
        calib_text=calib_label,
        eval_text=eval_label,
        notes=notes,
        held_out=held_out,
        held_out_text=held_out_label,
        evaluated=evaluated,
        calib_counts=dict(zip(labels, counts, strict=True)),
    )


def load_text(spec: str | None, purpose: str, tokenizer: Any = None) -> tuple[str, str]:
    """Read a text; returns it and its label for reports.

    Args:
        spec: a file (text, or .jsonl, .csv, .tsv or .parquet with a "text": `text_files`), `package:NAME/FILE`, a data set
            as `NAME[:CONFIG][@SPLIT]`, or `hub:KIND`, of which the beginning is read. None is WikiText-2 from the Hub, or the
            packaged text (CC BY) if the Hub cannot be reached.
        purpose: "calibration", "evaluation" or "held-out".
        tokenizer: whose chat template conversations are written in.

    Raises:
        InputError: not found, not UTF-8, or without text.
        ResourceError: the data set cannot be downloaded.
    """
    documents, label = _load(spec, purpose, tokenizer=tokenizer)
    return "\n\n".join(documents), label


def load_documents(spec: str | None, joined: bool = False, tokenizer: Any = None) -> tuple[Iterable[str], str]:
    """The documents of a training text, as a list or, of a data set, as a stream; and its label.

    Args:
        spec: as for `load_text`.
        joined: whether rows are parts of one text (WikiText's always are).
        tokenizer: as for `load_text`.

    Raises:
        InputError, ResourceError: as `load_text`.
    """
    documents, label = _load(spec, "calibration", streaming=True, tokenizer=tokenizer)
    if joined or label.startswith(WIKITEXT):
        documents = _together(documents)
    return documents, label


def _together(rows: Iterable[str]) -> Iterator[str]:
    """Join rows to documents of about PIECE characters."""
    held, size = [], 0
    for row in rows:
        held.append(row)
        size += len(row)
        if size >= PIECE:
            yield "\n\n".join(held)
            held, size = [], 0
    if held:
        yield "\n\n".join(held)


def _load(spec: str | None, purpose: str, streaming: bool = False, tokenizer: Any = None) -> tuple[Iterable[str], str]:
    """Documents and label. Only a data set can be streamed."""
    if spec == NONE:
        raise UsageError(
            f"{NONE} is no {purpose} text: only a conversion's --eval can be {NONE}; a file of that name is ./{NONE}"
        )
    if spec is None:
        try:
            return _load_data_set(f"{DEFAULT_DATASET}@{SPLITS[purpose]}", streaming)
        except ResourceError:
            # Only an unreachable Hub is replaced: a data set that is there and cannot be read stays an error.
            documents, label = _load(SHIPPED[purpose], purpose)
            return documents, f"{label} (WikiText-2 could not be fetched from the Hub)"
    if spec in mixture.MIXTURES and not expanded(spec).is_file():
        one = mixture.MIXTURES[spec][0]
        raise UsageError(f"{spec} is several texts, and the {purpose} text is one: give, for example, {one}")
    if spec.startswith(PACKAGE):
        file = packaged(spec, purpose)
        if not file.is_file():
            raise InputError(f"{purpose} text {spec} not found: the package has no such file")
        return read_documents(file), spec.removeprefix(PACKAGE)
    if spec.startswith(mixture.HUB):
        documents, label = hub_mixture.open_kind(spec, tokenizer)
        return documents if streaming else hub_mixture.beginning(documents), label
    path = expanded(spec)
    if path.is_file():
        return read_documents(path), plain(path.name)
    # Such a name means a file; as the name of a data set it would be asked for on the Hub.
    if is_text_name(path.name) or spec.startswith((".", "/", "~")):
        raise InputError(f"{purpose} text {spec} not found: give an existing file or a data set name")
    return _load_data_set(spec, streaming)


def repeatable(spec: str | None, label: str, purpose: str) -> tuple[str, bool]:
    """A `spec` for a recipe that names the text of `load_text(spec, purpose)`; and whether the text is a local file.

    A local file is named without its folder; the default text is named explicitly.

    Args:
        spec: as for `load_text`.
        label: that `load_text` returned.
        purpose: as for `load_text`.
    """
    if spec == NONE and purpose == "evaluation":
        return spec, False
    if spec is None:
        return (label if label == f"{DEFAULT_DATASET}@{SPLITS[purpose]}" else SHIPPED[purpose]), False
    path = expanded(spec)
    if not spec.startswith(PACKAGE) and path.is_file():
        return plain(path.name), True
    return spec, False


def _load_data_set(spec: str, streaming: bool) -> tuple[Iterable[str], str]:
    rows, columns = open_named(spec, streaming)
    if "text" not in columns:
        raise InputError(f'data set {spec!r} has no "text" column, only {", ".join(columns)}')
    return (strings(rows, spec) if streaming else list(strings(rows, spec))), spec
