"""Text to heal on: tokenised once into a file that all processes map, and cut into the windows of every training step.

The windows of a step are a function of the seed and the step's number alone: they are the same for a run that resumes from
a checkpoint, and for other numbers of processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mla_convert.core.errors import InputError
from mla_convert.modeling.loss_terms import IGNORED
from mla_convert.source import texts
from mla_convert.source.tokens import first_tokens

IDS, STARTS, GENERATED = "tokens.npy", "documents.npy", "generated.npy"
# Fraction of the data, at its end, that is never trained on; most tokens of it in one evaluation.
HELD_OUT_FRACTION, HELD_OUT_MAX = 1 / 20, 1 << 17
# Tokens of all held-out evaluations, as a fraction of the training's; least tokens of one evaluation; least evaluations.
EVALUATED_FRACTION, EVALUATION_MIN, EVALUATIONS_MIN = 0.2, 1 << 12, 4
# Characters per token, assumed before any are tokenised, to tell whether a text is longer than needed.
CHARACTERS = 4
TOKENISED = 64  # pieces of documents tokenised at once
PIECE = 1 << 16  # characters of a piece: the time of some tokenizers grows faster than the text


@dataclass(frozen=True)
class Corpus:
    """All documents, one after another. The end of the self-generated text and the end of the given text are held out."""

    ids: np.ndarray  # token ids (N,)
    starts: np.ndarray  # offsets (D,) at which documents begin
    generated: int = 0  # the first tokens are self-generated; the given text follows

    @property
    def train_end(self) -> int:
        """Offset at which the held-out end of the given text begins."""
        return len(self.ids) - _held_out_tokens(len(self.ids) - self.generated)

    @property
    def generated_end(self) -> int:
        """Offset at which the held-out end of the self-generated text begins."""
        return self.generated - (_held_out_tokens(self.generated) if self.generated else 0)


def _held_out_tokens(tokens: int) -> int:
    return min(HELD_OUT_MAX, max(1, round(tokens * HELD_OUT_FRACTION)))


def make_corpus(
    spec: str | None,
    tokenizer: Any,
    most: int,
    folder: Path,
    joined: bool = False,
    model: texts.Reach = texts.Reach(),  # noqa: B008
) -> str:
    """Tokenise a text into `folder`.

    A text file is one document; a row of a `.jsonl` file, or of a data set (which is streamed), is one each.

    Args:
        spec: names the text, as `texts.load_documents` reads it.
        tokenizer: of the model.
        most: tokens at most, about; of a longer file, pieces from all over it are taken.
        folder: made if it is not there.
        joined: rows are parts of one document.
        model: limits of the token ids.

    Returns:
        The text's label.

    Raises:
        InputError, ResourceError: as `texts.load_documents`; or no two tokens, or one that `model` has no embedding for.
    """
    documents, label = texts.load_documents(spec, joined)
    if isinstance(documents, list):
        documents = _thinned(documents, most)
    prefix = first_tokens(tokenizer)
    parts, starts, total = [], [], 0
    for ids in _predictable(_tokenised(documents, tokenizer), prefix):
        starts.append(total)
        parts.append(np.asarray(ids, dtype=np.int32))
        total += len(parts[-1])
        if total >= most:
            break
    if not parts:
        raise InputError(
            f"the text {label} has no two tokens that follow one another, too few to heal on: give more text"
        )
    model.check(torch.from_numpy(np.concatenate(parts)), label)
    folder.mkdir(parents=True, exist_ok=True)
    save_corpus(folder, np.concatenate(parts)[:most], np.asarray(starts, dtype=np.int64))
    return label


def add_generated(folder: Path, ids: np.ndarray) -> None:
    """Put self-generated text before the text that `make_corpus` wrote, as one document.

    Texts that follow one another in a window see each other: for a distillation any context is as good, and windows of
    one document need no mask.

    Args:
        folder: of the corpus.
        ids: token ids (N,).
    """
    corpus = open_corpus(folder)
    starts = np.concatenate([[0], corpus.starts + len(ids)]).astype(np.int64)
    save_corpus(folder, np.concatenate([ids.astype(np.int32), corpus.ids]), starts, corpus.generated + len(ids))


def save_corpus(folder: Path, ids: np.ndarray, starts: np.ndarray, generated: int = 0) -> None:
    """Write a corpus, file by file under a temporary name; for the arguments see `Corpus`."""
    for name, array in ((STARTS, starts), (IDS, ids), (GENERATED, np.asarray(generated))):
        temporary = folder / f".{os.getpid()}.{name}"
        np.save(temporary, array)
        os.replace(temporary, folder / name)


def needed_tokens(tokens: int) -> int:
    """Tokens of text for a run over `tokens` tokens: each at most once, and the held-out end."""
    return round(tokens * (1 + 2 * HELD_OUT_FRACTION)) + (1 << 12)


def open_corpus(folder: Path) -> Corpus:
    """Map the corpus that `make_corpus` wrote."""
    return Corpus(np.load(folder / IDS, mmap_mode="r"), np.load(folder / STARTS), int(np.load(folder / GENERATED)))


def _tokenised(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document that has any. The pieces of many documents are tokenised at once, on all cores."""
    batch: list[tuple[int, str]] = []
    held: list[int] = []  # ids of a document that may continue in the next batch
    last = 0

    def flush() -> Iterator[tuple[int, list[int]]]:
        encoded = tokenizer([piece for _, piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip([number for number, _ in batch], encoded, strict=True)
        batch.clear()

    def merged(encoded: Iterable[tuple[int, list[int]]]) -> Iterator[list[int]]:
        nonlocal held, last
        for number, ids in encoded:
            if number != last and held:
                yield held
                held = []
            held, last = held + ids if held else list(ids), number

    for number, document in enumerate(documents):
        for piece in pieces(document):
            batch.append((number, piece))
            if len(batch) == TOKENISED:
                yield from merged(flush())
    if batch:
        yield from merged(flush())
    if held:
        yield held


def _predictable(documents: Iterable[list[int]], prefix: list[int]) -> Iterator[list[int]]:
    """Documents behind `prefix`, each with a token to predict: a single token is joined to the next document."""
    held: list[int] = []
    for ids in documents:
        held = held + ids if held else prefix + ids
        if len(held) > 1:
            yield held
            held = []


def pieces(document: str) -> list[str]:
    """A document in parts of at most PIECE characters, cut at line ends where there are any."""
    parts, start = [], 0
    while start < len(document):
        stop = min(start + PIECE, len(document))
        if stop < len(document):
            stop = document.rfind("\n", start + PIECE // 2, stop) + 1 or stop
        parts.append(document[start:stop])
        start = stop
    return parts


def _thinned(documents: list[str], most: int) -> list[str]:
    """Everything, or pieces at even distances where that is much more than `most` tokens."""
    characters = sum(map(len, documents))
    if characters <= 2 * CHARACTERS * most:
        return documents
    parts = [piece for document in documents for piece in pieces(document)]
    count = max(1, -(-len(parts) * 2 * CHARACTERS * most // characters))
    return [parts[index * len(parts) // count] for index in range(min(count, len(parts)))]


@dataclass(frozen=True)
class Batch:
    """Windows (B, L) of a training step."""

    ids: Tensor
    labels: Tensor  # the token that follows each, or IGNORED
    positions: Tensor | None  # where a window holds more than one document

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        ids, labels = (each.to(device, non_blocking=True) for each in (self.ids, self.labels))
        return Batch(ids, labels, None if self.positions is None else self.positions.to(device, non_blocking=True))


def cut(corpus: Corpus, begins: list[int], length: int) -> Batch:
    """Cut windows out of a corpus.

    Where a document begins inside a window, positions restart at 0, from which transformers derives a mask that separates
    the documents; the token before has no label.

    Args:
        corpus: tokens and documents.
        begins: offsets of the windows.
        length: tokens of a window.
    """
    ids = np.stack([corpus.ids[begin : begin + length] for begin in begins]).astype(np.int64)
    labels = np.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    positions = np.broadcast_to(np.arange(length), ids.shape).copy()
    packed = False
    for row, begin in enumerate(begins):
        first, last = np.searchsorted(corpus.starts, [begin + 1, begin + length])
        for start in corpus.starts[first:last] - begin:
            packed = True
            labels[row, start - 1] = IGNORED
            positions[row, start:] = np.arange(length - start)
    return Batch(*map(torch.from_numpy, (ids, labels)), torch.from_numpy(positions) if packed else None)


def noised(batch: Batch, fraction: float, vocabulary: Tensor, keys: list[tuple[int, ...] | None]) -> Batch:
    """Replace tokens of some windows by random ones.

    As in calibration (`tokens.noised`), contexts that no text contains keep the model from specialising in the text at
    hand. The first token of a window, the attention sink, stays; random tokens are no labels.

    Args:
        batch: windows of text.
        fraction: of the tokens that are replaced.
        vocabulary: token ids (V,) to draw from.
        keys: for each window the seed of its noise, or None for none.
    """
    ids, labels = batch.ids.clone(), batch.labels.clone()
    for row, key in enumerate(keys):
        if key is not None:
            draw = np.random.default_rng(key)
            chosen = torch.from_numpy(draw.random(ids.shape[1]) < fraction)
            chosen[0] = False
            ids[row, chosen] = vocabulary[torch.from_numpy(draw.integers(0, len(vocabulary), int(chosen.sum())))]
            labels[row, :-1][chosen[1:]] = IGNORED
    return Batch(ids, labels, batch.positions)


def held_out(corpus: Corpus, length: int, self_fraction: float = 0.0, most: int = HELD_OUT_MAX) -> list[int]:
    """Offsets of the windows that are never trained on.

    Args:
        corpus: whose given text and self-generated text both have a held-out end.
        length: tokens of a window.
        self_fraction: of the windows that are self-generated, as in training.
        most: tokens of all windows, about.

    Raises:
        InputError: the given text is too short for one window.
    """
    length = held_length(corpus, length)
    if length < 2:
        raise InputError(
            f"the text has {len(corpus.ids) - corpus.generated} tokens, too few to heal on: give more text"
        )
    offsets = []
    for begin, end, fraction in (
        (corpus.train_end, len(corpus.ids), 1 - self_fraction),
        (corpus.generated_end, corpus.generated, self_fraction),
    ):
        windows = range(begin, end - length + 1, length)
        count = min(len(windows), max(1, round(most * fraction / length))) if fraction else 0
        offsets += [windows[index * len(windows) // count] for index in range(count)]
    return offsets


def evaluations(tokens: int, most: int) -> tuple[int, int]:
    """Number and size of the held-out evaluations of a run.

    All of them take about a twelfth of the run's time; a short run has fewer of them, rather than ones on few tokens.

    Args:
        tokens: that are trained on.
        most: evaluations.

    Returns:
        The number of evaluations, and tokens in each.
    """
    budget = EVALUATED_FRACTION * tokens
    count = min(most, max(EVALUATIONS_MIN, int(budget // EVALUATION_MIN)))
    return count, min(HELD_OUT_MAX, max(EVALUATION_MIN, round(budget / count)))


def held_length(corpus: Corpus, length: int) -> int:
    """Tokens of a held-out window: `length`, or all that are held out of the given text if they are fewer."""
    return min(length, len(corpus.ids) - corpus.train_end)


@dataclass(frozen=True)
class Window:
    """A training window."""

    begin: int  # offset in the corpus
    odd: bool  # odd number among the windows of its kind: the ones that get noise, if there is any


def check_enough(corpus: Corpus, mix: tuple[tuple[int, float], ...]) -> None:
    """Refuse a text that is too short to train and to evaluate on, before anything is measured.

    Args:
        corpus: the text.
        mix: lengths of the windows with their fractions of the tokens.

    Raises:
        InputError: the text holds no window to train on, or none to evaluate on.
    """
    train = corpus.train_end - corpus.generated
    for length, _ in mix:
        if length > train:
            raise InputError(
                f"the text has {train} tokens to train on, fewer than one window of {length}: give more text, "
                f"or lower --length"
            )
    held_out(corpus, mix[0][0])


class Schedule:
    """The windows of every step, with each length and each kind of text in proportion.

    Every pass over a text cuts it at another offset and takes its windows in another order.
    """

    def __init__(
        self,
        corpus: Corpus,
        mix: tuple[tuple[int, float], ...],
        step_tokens: int,
        steps: int,
        seed: int,
        processes: int = 1,
        self_fraction: float = 0.0,
    ):
        """Choose the window length of every step.

        Args:
            corpus: the text.
            mix: lengths of the windows with their fractions of the tokens; a step has windows of one length.
            step_tokens: tokens of a step over all processes, about.
            steps: of the run.
            seed: of the order of the windows.
            processes: the windows of a step are a multiple of it.
            self_fraction: of the windows that are self-generated.

        Raises:
            InputError: the text is too short, as in `check_enough`.
        """
        self._seed, self._orders = seed, {}
        self._self_fraction = self_fraction if corpus.generated else 0.0
        self._texts = (corpus.generated, corpus.train_end), (0, corpus.generated_end)  # given, self-generated
        check_enough(corpus, mix)
        self.windows = {length: -(-max(1, step_tokens // length) // processes) * processes for length, _ in mix}
        self.steps: list[tuple[int, int]] = []  # length and number of the first window, of every step
        used, taken, total = dict.fromkeys(self.windows, 0), dict.fromkeys(self.windows, 0), 0
        fractions = dict(mix)
        for _ in range(steps):
            length = max(fractions, key=lambda each: fractions[each] * (total + step_tokens) - used[each])
            self.steps.append((length, taken[length]))
            taken[length] += self.windows[length]
            used[length] += self.windows[length] * length
            total += self.windows[length] * length

    def tokens(self, step: int) -> int:
        """Tokens of one step over all processes."""
        length, _ = self.steps[step]
        return length * self.windows[length]

    def step(self, number: int) -> tuple[int, list[Window]]:
        """Window length of a step, and its windows."""
        length, first = self.steps[number]
        return length, [self._window(length, first + index) for index in range(self.windows[length])]

    def _window(self, length: int, number: int) -> Window:
        """Window `number` of a length over the whole run; self-generated ones are spread evenly."""
        before = math.floor(number * self._self_fraction)  # self-generated windows
        generated = math.floor((number + 1) * self._self_fraction) > before
        index = before if generated else number - before
        return Window(self._begin(length, generated, index), index % 2 == 1)

    def _begin(self, length: int, generated: bool, number: int) -> int:
        """Offset of window `number` of a kind of text."""
        first, stop = self._texts[generated]
        count = max(1, (stop - first) // length - 1)
        epoch, index = divmod(number, count)
        key = length, generated, epoch
        if key not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if known[:2] != key[:2]}
            draw = np.random.default_rng((self._seed, length, int(generated), epoch))
            self._orders[key] = int(draw.integers(0, stop - first - count * length + 1)), draw.permutation(count)
        offset, order = self._orders[key]
        return first + offset + int(order[index]) * length
