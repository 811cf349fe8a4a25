"""Calibration and evaluation text: from a file, a `datasets` name, the default data set or the package; cut into windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla_convert.core.errors import InputError, ResourceError, UsageError, one_line
from mla_convert.core.settings import PACKAGE, ConvertConfig, packaged
from mla_convert.core.words import expanded, plain
from mla_convert.source import mixture
from mla_convert.source.text_files import is_text_name, read_documents
from mla_convert.source.tokens import first_tokens, noised, tokenise

WIKITEXT = "Salesforce/wikitext:"
DEFAULT_DATASET = f"{WIKITEXT}wikitext-2-raw-v1"
SHIPPED = {"calibration": "package:mla_demo/calibration.txt.gz", "evaluation": "package:mla_demo/evaluation.txt.gz"}
SPLITS = {"calibration": "train", "evaluation": "test"}
# Windows and tokens in one, by whether there is a GPU.
CALIB_DEFAULT = {True: (2048, 1024), False: (32, 512)}
# On a GPU, as many windows as this holds of the residual stream's width, but no fewer than LEAST_ON_GPU: wide models have
# more to keep what they are by, and every window costs more.
WIDTH_WINDOWS, LEAST_ON_GPU = 1 << 20, 256
# Windows that are enough where none were asked for and the text holds no more.
FEWEST = 32
EVAL_LENGTH = 2048
# As an evaluation text: none, and no evaluation.
NONE = "none"
# As a held-out text: the last part of the calibration text, which calibration then does not see.
FROM_CALIB, CALIB_SHARE = "calib", 0.9
# Text is tokenised piece by piece, in characters; no tokenizer here packs more than this many characters into a token.
PIECE = 1 << 18
CHARACTERS_PER_TOKEN = 16
# Characters from one calibration window to the next where they are spread: most such pieces hold a whole window.
SPREAD_CHARACTERS = 8


@dataclass(frozen=True)
class Windows:
    """Token windows (N, L) of all texts, what they are in words, and notes about defaults that were fallen back on.

    `held_out` are windows to choose settings by, of the length of those of `evaluation`, which then need not be chosen on.
    Without `evaluated`, nothing is to be said of `evaluation`, which is then a window of the calibration text.
    """

    calib: Tensor
    evaluation: Tensor
    calib_text: str
    eval_text: str
    notes: list[str]
    held_out: Tensor | None = None
    held_out_text: str | None = None
    evaluated: bool = True
    # windows of each calibration text, by its label
    calib_counts: dict[str, int] | None = None

    @property
    def measured(self) -> Tensor:
        """Every window that perplexity is measured on: those of the evaluation first."""
        return self.evaluation if self.held_out is None else torch.cat([self.evaluation, self.held_out])

    def labels(self, config: ConvertConfig) -> dict[str, Any]:
        """The texts that were asked for as reports name them: without paths."""
        return {"calib": config.calib and self.calib_text, "eval": config.eval and self.eval_text,
                "held_out": config.held_out and self.held_out_text,
                "heal_data": config.heal_data and repeatable(config.heal_data, "", "")[0]}  # fmt: skip

    @property
    def calib_protocol(self) -> str:
        """The calibration windows in words."""
        return f"{self.calib_text}, {self.calib.shape[0]} windows of {self.calib.shape[1]} tokens"

    @property
    def eval_protocol(self) -> str:
        """The evaluation windows in words."""
        return evaluation_protocol(self.evaluation)


@dataclass(frozen=True)
class Reach:
    """What a model can read: windows of `longest` tokens, where it has a limit, and tokens below `vocabulary`.

    `learned`: positions from `longest` on do not exist, as the model has an embedding for each.
    """

    longest: int | None = None
    learned: bool = False
    vocabulary: int | None = None

    def length(self, given: int | None, default: int) -> int:
        """Tokens of a window: what was given, or the default; no more than there are positions."""
        if given is None:
            return min(default, self.longest or default)
        return min(given, self.longest) if self.learned and self.longest else given

    def note(self, given: int | None, option: str) -> list[str]:
        """That the windows are shorter than `option` asked for, if they are."""
        if given is None or self.length(given, given) == given:
            return []
        return [f"the model has learned {self.longest} positions: windows are so long, not {option} {given}"]

    def check(self, windows: Tensor, label: str) -> Tensor:
        """Windows that the model has an embedding for every token of.

        Raises:
            InputError: there is a token that it has none for.
        """
        most = int(windows.max())
        if self.vocabulary is not None and most >= self.vocabulary:
            raise InputError(
                f"the tokenizer makes token {most} of {label}, and the model's embedding has {self.vocabulary} rows: "
                f"tokenizer and weights do not belong together"
            )
        return windows


def reach(config: Any, learned: bool) -> Reach:
    """The reach of the model that a configuration describes. `learned`: it has learned positions instead of RoPE."""
    return Reach(getattr(config, "max_position_embeddings", None), learned, getattr(config, "vocab_size", None))


def calibration_size(config: ConvertConfig, on_gpu: bool, hidden: int, model: Reach = Reach()) -> tuple[int, int]:
    """Calibration windows and tokens in one; `hidden` is the size of the model's residual stream."""
    samples, length = CALIB_DEFAULT[on_gpu]
    if on_gpu:
        samples = min(samples, max(LEAST_ON_GPU, WIDTH_WINDOWS // hidden))
    return config.calib_samples or samples, model.length(config.calib_length, length)


def evaluation_length(config: ConvertConfig, model: Reach) -> int:
    """Tokens of an evaluation window."""
    return model.length(config.eval_length, EVAL_LENGTH)


def load_windows(config: ConvertConfig, tokenizer: Any, on_gpu: bool, model: Reach, hidden: int) -> Windows:
    """All texts of a conversion, cut into windows, for a model with a residual stream of `hidden`.

    Raises:
        InputError: a text that cannot be used, or a tokenizer of another model.
    """
    samples, length = calibration_size(config, on_gpu, hidden, model)
    fewest = config.calib_samples or min(samples, FEWEST)
    eval_length = evaluation_length(config, model)
    given = mixture.parts(config.calib)
    loaded = [load_text(part.spec, "calibration") for part in given]
    calib_texts, labels = [text for text, _ in loaded], [label for _, label in loaded]
    calib_label = mixture.label(labels, given) if config.calib else mixture.PACKAGED_LABEL
    evaluated = config.eval != NONE
    eval_text, eval_label = load_text(config.eval, "evaluation") if evaluated else ("", NONE)
    held_out, held_out_label = None, None
    if config.held_out == FROM_CALIB:
        cuts = [int(len(text) * CALIB_SHARE) for text in calib_texts]
        rest = "\n\n".join(text[cut:] for text, cut in zip(calib_texts, cuts, strict=True))
        calib_texts = [text[:cut] for text, cut in zip(calib_texts, cuts, strict=True)]
        held_out_label = f"the end of {calib_label}"
    elif config.held_out:
        rest, held_out_label = load_text(config.held_out, "held-out")
    if held_out_label:
        held_out = evaluation_windows(rest, tokenizer, config.eval_windows, eval_length, held_out_label, "held-out")
        model.check(held_out, held_out_label)
    stood_in = {"calibration": (config.calib, calib_label), "evaluation": (config.eval, eval_label)}
    weighted = [(text, label, part.weight) for text, label, part in zip(calib_texts, labels, given, strict=True)]
    calib, counts = mixed_windows(weighted, tokenizer, samples, length, config.seed, fewest)
    model.check(calib, calib_label)
    evaluation = calib[:1]  # says at least whether what the model computes is finite
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


def load_text(spec: str | None, purpose: str) -> tuple[str, str]:
    """The text that `spec` names and a label for reports. `purpose` is "calibration", "evaluation" or "held-out".

    `spec` is a file (text, or .jsonl, .csv, .tsv or .parquet with a "text": `text_files`), `package:NAME/FILE`, or a data set as
    `NAME[:CONFIG][@SPLIT]`. None is WikiText-2 from the Hub, or the packaged text (CC BY) where the Hub cannot be reached.

    Raises:
        InputError: not found, not UTF-8, no text in it.
        ResourceError: a data set that was asked for cannot be fetched.
    """
    documents, label = _load(spec, purpose)
    return "\n\n".join(documents), label


def load_documents(spec: str | None, joined: bool = False) -> tuple[Iterable[str], str]:
    """The documents of a training text, named as for `load_text`, and its label: a list, or for a data set a stream.

    `joined`: rows are parts of one text, as WikiText's are (which is known of that one).

    Raises:
        InputError, ResourceError: as `load_text`.
    """
    documents, label = _load(spec, "calibration", streaming=True)
    if joined or label.startswith(WIKITEXT):
        documents = _together(documents)
    return documents, label


def _together(rows: Iterable[str]) -> Iterator[str]:
    """Rows joined to documents of about PIECE characters."""
    held, size = [], 0
    for row in rows:
        held.append(row)
        size += len(row)
        if size >= PIECE:
            yield "\n\n".join(held)
            held, size = [], 0
    if held:
        yield "\n\n".join(held)


def _load(spec: str | None, purpose: str, streaming: bool = False) -> tuple[Iterable[str], str]:
    """Documents and label. Only a data set may be streamed."""
    if spec == NONE:
        raise UsageError(
            f"{NONE} is no {purpose} text: only a conversion's --eval can be {NONE}; a file of that name is ./{NONE}"
        )
    if spec is None:
        try:
            return _load_dataset(f"{DEFAULT_DATASET}@{SPLITS[purpose]}", streaming)
        except ResourceError:
            documents, label = _load(SHIPPED[purpose], purpose)
            return documents, f"{label} (WikiText-2 could not be fetched from the Hub)"
    if spec.startswith(PACKAGE):
        file = packaged(spec, purpose)
        if not file.is_file():
            raise InputError(f"{purpose} text {spec} not found: the package has no such file")
        return read_documents(file), spec.removeprefix(PACKAGE)
    path = expanded(spec)
    if path.is_file():
        return read_documents(path), plain(path.name)
    if is_text_name(path.name) or spec.startswith((".", "/", "~")):
        raise InputError(f"{purpose} text {spec} not found: give an existing file or a data set name")
    return _load_dataset(spec, streaming)


def repeatable(spec: str | None, label: str, purpose: str) -> tuple[str, bool]:
    """What names again the text that `load_text(spec, purpose)` returned with `label`; whether it is a local file.

    A local file is named without its folder. Where none was given it is what stood in for it.
    """
    if spec == NONE and purpose == "evaluation":
        return spec, False
    if spec is None:
        return (label if label == f"{DEFAULT_DATASET}@{SPLITS[purpose]}" else SHIPPED[purpose]), False
    path = expanded(spec)
    if not spec.startswith(PACKAGE) and path.is_file():
        return plain(path.name), True
    return spec, False


def _load_dataset(spec: str, streaming: bool) -> tuple[Iterable[str], str]:
    import datasets  # a second of import that local text does not need

    name, _, split = spec.partition("@")
    name, _, config = name.partition(":")
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
        columns = rows.column_names or list(next(iter(rows)))  # a stream may know them only from its rows
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
        raise ResourceError(
            f"data set {spec!r} cannot be fetched: give a text file, or a name that the Hub has"
        ) from error
    except Exception as error:  # whatever the rows of others run into
        raise InputError(f"data set {spec!r} cannot be read: {one_line(error)}") from error
    if "text" not in columns:
        raise InputError(f'data set {spec!r} has no "text" column, only {", ".join(columns)}')
    return (_rows(rows, spec) if streaming else list(_rows(rows, spec))), spec


def _rows(rows: Iterable[dict[str, Any]], spec: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row["text"], str):
            raise InputError(f'row {number} of data set {spec!r} has no string in its column "text"')
        yield row["text"]


def evaluation_windows(
    text: str, tokenizer: Any, count: int, length: int, label: str, purpose: str = "evaluation"
) -> Tensor:
    """Non-overlapping windows (n, length) from the start of the text, tokenised as a whole; n <= count.

    Raises:
        InputError: not one window long.
    """
    ids = tokenise(tokenizer, text[: count * length * CHARACTERS_PER_TOKEN], special=True)
    found = min(count, len(ids) // length)
    if not found:
        raise InputError(
            f"{purpose} text {label} has {len(ids)} tokens, fewer than one window of {length}: give more text"
        )
    return torch.tensor(ids[: found * length]).view(found, length)


def evaluation_protocol(windows: Tensor) -> str:
    """Evaluation windows (n, length) in words."""
    count, length = windows.shape
    return f"{count} window{'s' if count > 1 else ''} of {length} tokens, not overlapping"


def calibration_windows(
    text: str, tokenizer: Any, count: int, length: int, seed: int, label: str, fewest: int | None = None
) -> Tensor:
    """Windows (count, length) from all over the text, in an order drawn by `seed`; `fewest` are enough.

    Each begins with the tokenizer's beginning-of-sequence token if it adds one: first tokens are attention sinks with
    outlying activations, and served text has them.

    Raises:
        InputError: the text is too short for `count` windows, or for `fewest` if that is given.
    """
    prefix = first_tokens(tokenizer)
    body = length - len(prefix)
    generator = torch.Generator().manual_seed(seed)
    # one window from each of many places, where there is text enough: neighbours tell the same story
    share = 5 * count // (4 * (1 + len(text) // PIECE))
    for characters, most in ((body * SPREAD_CHARACTERS, 1), (PIECE, share), (PIECE, None)):
        windows: list[list[int]] = []
        for piece in torch.randperm(-(-len(text) // characters), generator=generator).tolist():
            ids = tokenise(tokenizer, text[piece * characters : (piece + 1) * characters], special=False)
            starts = range(0, len(ids) - body + 1, body)[:most]
            windows += [prefix + ids[start : start + body] for start in starts]
            if len(windows) >= count:
                break
        if len(windows) >= count:
            break
    least = count if fewest is None else fewest
    if len(windows) < least:
        raise InputError(
            f"calibration text {label} is too short: it holds {len(windows)} windows of {length} tokens and {least} are "
            f"wanted; give more text, or lower --calib-samples or --calib-length"
        )
    order = torch.randperm(len(windows), generator=generator)[:count]
    return torch.tensor([windows[index] for index in order.tolist()], dtype=torch.int64).view(-1, length)


def mixed_windows(
    weighted: list[tuple[str, str, float]], tokenizer: Any, count: int, length: int, seed: int, fewest: int
) -> tuple[Tensor, list[int]]:
    """Windows (n, length), fewest <= n <= count, of several texts (text, label, weight), and how many are of each.

    Where a text holds fewer than its share, those that hold more make up for it;
    one that holds none is refused. Windows of all texts are in one random order.

    Raises:
        InputError: one of them, or all together, are too short.
    """
    if len(weighted) == 1:
        ((text, label, _),) = weighted
        windows = calibration_windows(text, tokenizer, count, length, seed, label, fewest)
        return windows, [len(windows)]
    wanted = mixture.quotas([weight for _, _, weight in weighted], count)
    found = [calibration_windows(text, tokenizer, want, length, seed, label, 1) if want else None
             for (text, label, _), want in zip(weighted, wanted, strict=True)]  # fmt: skip
    held = [0 if windows is None else len(windows) for windows in found]
    for index, (text, label, _) in enumerate(weighted):
        if (missing := count - sum(held)) and held[index] == wanted[index]:
            more = calibration_windows(text, tokenizer, held[index] + missing, length, seed, label, 0)
            found[index], held[index] = more, len(more)
    if sum(held) < fewest:
        raise InputError(
            f"calibration texts are too short: together they hold {sum(held)} windows of {length} tokens and {fewest} are wanted; "
            f"give more text, or lower --calib-samples or --calib-length"
        )
    windows = torch.cat([each for each in found if each is not None and len(each)])
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))], held
