"""Text to heal on: tokenised once into a file that all processes map, and cut into the windows of every training step.

Which windows a step sees is a function of the seed and the step's number alone: a run that goes on from a checkpoint, and
one on other numbers of processes, see the same ones.
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

IDS, STARTS, ADDED = "tokens.npy", "documents.npy", "added.npy"
# Share of the data, its end, that is never trained on; tokens of it that are looked at.
HELD_OUT_SHARE, HELD_OUT_MAX = 1 / 20, 1 << 17
# Tokens that are looked at, over all looks, as a share of those that are trained on; at least so many a look, in so many.
LOOKED_AT, LOOK_MIN, LOOKS_MIN = 0.2, 1 << 12, 4
# Characters that a token is taken to be before any has been counted, to see whether a text is longer than needed.
CHARACTERS = 4
TOKENISED = 64  # pieces of documents tokenised at once
PIECE = 1 << 16  # characters of a piece: a tokenizer's time can grow faster than the text


@dataclass(frozen=True)
class Corpus:
    """Token ids (N,) of all documents, one after another, and the offsets (D,) at which they begin.

    The first `added` tokens are what the original wrote; behind them is the text that was given. The end of both is held
    out.
    """

    ids: np.ndarray
    starts: np.ndarray
    added: int = 0

    @property
    def train_end(self) -> int:
        """Where the held-out end of the given text begins."""
        return len(self.ids) - _held(len(self.ids) - self.added)

    @property
    def added_end(self) -> int:
        """Where the held-out end of what the original wrote begins."""
        return self.added - (_held(self.added) if self.added else 0)


def _held(tokens: int) -> int:
    return min(HELD_OUT_MAX, max(1, round(tokens * HELD_OUT_SHARE)))


def make_corpus(
    spec: str | None,
    tokenizer: Any,
    wanted: int,
    folder: Path,
    joined: bool = False,
    model: texts.Reach = texts.Reach(),  # noqa: B008
) -> str:
    """Tokenise what `spec` names, about `wanted` tokens of it at most, into `folder`. Returns the text's label.

    A file of text is one document, a row of a `.jsonl` file or of a data set (which is streamed) is one each, unless
    `joined` says that rows are parts of one text. Of a file that is longer than wanted, pieces from all over are taken.

    Raises:
        InputError, ResourceError: as `texts.load_text`; or no two tokens, or one that `model` has no embedding for.
    """
    documents, label = texts.load_documents(spec, joined)
    if isinstance(documents, list):
        documents = _thinned(documents, wanted)
    prefix = first_tokens(tokenizer)
    parts, starts, total = [], [], 0
    for ids in _taught(_tokenised(documents, tokenizer), prefix):
        starts.append(total)
        parts.append(np.asarray(ids, dtype=np.int32))
        total += len(parts[-1])
        if total >= wanted:
            break
    if not parts:
        raise InputError(
            f"the text {label} has no two tokens that follow one another, too few to heal on: give more text"
        )
    model.check(torch.from_numpy(np.concatenate(parts)), label)
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, np.concatenate(parts)[:wanted], np.asarray(starts, dtype=np.int64))
    return label


def add_written(folder: Path, ids: np.ndarray) -> None:
    """Put what the original wrote (N,) before what `make_corpus` wrote, as one document.

    Its texts follow one another in a window, and see each other: for a distillation a context is as good as another, and
    windows of one document need no mask.
    """
    corpus = open_corpus(folder)
    starts = np.concatenate([[0], corpus.starts + len(ids)]).astype(np.int64)
    _save(folder, np.concatenate([ids.astype(np.int32), corpus.ids]), starts, corpus.added + len(ids))


def _save(folder: Path, ids: np.ndarray, starts: np.ndarray, added: int = 0) -> None:
    for name, array in ((STARTS, starts), (IDS, ids), (ADDED, np.asarray(added))):
        temporary = folder / f".{os.getpid()}.{name}"
        np.save(temporary, array)
        os.replace(temporary, folder / name)


def wanted_tokens(tokens: int) -> int:
    """Tokens of text for a run over so many: each at most once, and the held-out end."""
    return round(tokens * (1 + 2 * HELD_OUT_SHARE)) + (1 << 12)


def open_corpus(folder: Path) -> Corpus:
    """What `make_corpus` wrote, mapped."""
    return Corpus(np.load(folder / IDS, mmap_mode="r"), np.load(folder / STARTS), int(np.load(folder / ADDED)))


def _tokenised(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document that has any. Pieces of many are tokenised at once, on all cores."""
    batch: list[tuple[int, str]] = []
    held: list[int] = []  # of a document that may go on in the next batch
    last = 0

    def flush() -> Iterator[tuple[int, list[int]]]:
        found = tokenizer([piece for _, piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip([number for number, _ in batch], found, strict=True)
        batch.clear()

    def merged(found: Iterable[tuple[int, list[int]]]) -> Iterator[list[int]]:
        nonlocal held, last
        for number, ids in found:
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


def _taught(documents: Iterable[list[int]], prefix: list[int]) -> Iterator[list[int]]:
    """Documents behind `prefix`, each with a token to foretell: one that is a single token goes with the next one."""
    held: list[int] = []
    for ids in documents:
        held = held + ids if held else prefix + ids
        if len(held) > 1:
            yield held
            held = []


def pieces(document: str) -> list[str]:
    """A document in parts of at most PIECE characters, cut at line ends where there are any."""
    found, start = [], 0
    while start < len(document):
        stop = min(start + PIECE, len(document))
        if stop < len(document):
            stop = document.rfind("\n", start + PIECE // 2, stop) + 1 or stop
        found.append(document[start:stop])
        start = stop
    return found


def _thinned(documents: list[str], wanted: int) -> list[str]:
    """Everything, or pieces at even distances where that is much more than `wanted` tokens."""
    characters = sum(map(len, documents))
    if characters <= 2 * CHARACTERS * wanted:
        return documents
    parts = [piece for document in documents for piece in pieces(document)]
    count = max(1, -(-len(parts) * 2 * CHARACTERS * wanted // characters))
    return [parts[index * len(parts) // count] for index in range(min(count, len(parts)))]


@dataclass(frozen=True)
class Batch:
    """`ids` and `labels` (B, L), and `positions` (B, L) where a window holds more than one document, else None."""

    ids: Tensor
    labels: Tensor
    positions: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """On a device."""
        ids, labels = (each.to(device, non_blocking=True) for each in (self.ids, self.labels))
        return Batch(ids, labels, None if self.positions is None else self.positions.to(device, non_blocking=True))


def cut(corpus: Corpus, begins: list[int], length: int) -> Batch:
    """Windows of `length` tokens from given offsets.

    Where a document begins inside a window, positions begin anew, which transformers takes to mean that no token sees
    another document's; the token before has no label.
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


def noised(batch: Batch, share: float, vocabulary: Tensor, keys: list[tuple[int, ...] | None]) -> Batch:
    """The batch with a share of the tokens of some windows, but the first, replaced by random ones of `vocabulary` (V,).

    `keys` has a seed for every window that is to be noised, and None for the others. No label is a random token. As for
    calibration (`tokens.noised`), contexts that no text has keep the model from becoming a specialist of the text at hand.
    """
    ids, labels = batch.ids.clone(), batch.labels.clone()
    for row, key in enumerate(keys):
        if key is not None:
            draw = np.random.default_rng(key)
            chosen = torch.from_numpy(draw.random(ids.shape[1]) < share)
            chosen[0] = False  # the attention sink
            ids[row, chosen] = vocabulary[torch.from_numpy(draw.integers(0, len(vocabulary), int(chosen.sum())))]
            labels[row, :-1][chosen[1:]] = IGNORED  # nobody can foresee a random token
    return Batch(ids, labels, batch.positions)


def held_out(corpus: Corpus, length: int, share: float = 0.0, most: int = HELD_OUT_MAX) -> list[int]:
    """Offsets of windows that are never trained on, of about `most` tokens: of the text's end and, by their share of the
    training, of the end of what the original wrote.

    Raises:
        InputError: not one of the text.
    """
    length = held_length(corpus, length)
    if length < 2:
        raise InputError(f"the text has {len(corpus.ids) - corpus.added} tokens, too few to heal on: give more text")
    found = []
    for begin, end, part in (
        (corpus.train_end, len(corpus.ids), 1 - share),
        (corpus.added_end, corpus.added, share),
    ):
        windows = range(begin, end - length + 1, length)
        count = min(len(windows), max(1, round(most * part / length))) if part else 0
        found += [windows[index * len(windows) // count] for index in range(count)]
    return found


def looks(tokens: int, most: int) -> tuple[int, int]:
    """How often a run of so many tokens looks at the held-out windows, `most` times at most, and at how many tokens of them.

    Looking takes about a twelfth of the time of a run; one that is short looks less often, not at next to nothing.
    """
    room = LOOKED_AT * tokens
    count = min(most, max(LOOKS_MIN, int(room // LOOK_MIN)))
    return count, min(HELD_OUT_MAX, max(LOOK_MIN, round(room / count)))


def held_length(corpus: Corpus, length: int) -> int:
    """Tokens of a held-out window: `length`, or all there are."""
    return min(length, len(corpus.ids) - corpus.train_end)


@dataclass(frozen=True)
class Window:
    """Where a training window begins, and whether it is an odd one of its kind: those are noised, if any is."""

    begin: int
    odd: bool


def check_enough(corpus: Corpus, mix: tuple[tuple[int, float], ...]) -> None:
    """Refuse a text that is too short to train on and to look at, before anything is measured.

    Raises:
        InputError: not one window of each.
    """
    train = corpus.train_end - corpus.added
    for length, _ in mix:
        if length > train:
            raise InputError(
                f"the text has {train} tokens to train on, fewer than one window of {length}: give more text, "
                f"or lower --length"
            )
    held_out(corpus, mix[0][0])


class Schedule:
    """Which windows every step sees: of each length in turn, by its share of the tokens, and of the text evenly.

    `mix` is (length, share of tokens), `step_tokens` the tokens of a step over all processes; `share` of the windows are of
    what the original wrote. Every pass over a text cuts it at another place and takes its windows in another order.
    """

    def __init__(self, corpus: Corpus, mix: tuple[tuple[int, float], ...], step_tokens: int, steps: int, seed: int,
                 processes: int = 1, share: float = 0.0):  # fmt: skip
        """A step's windows are a multiple of `processes`.

        Raises:
            InputError: not one window of text to train on.
        """
        self._seed, self._orders = seed, {}
        self._share = share if corpus.added else 0.0
        self._texts = (corpus.added, corpus.train_end), (0, corpus.added_end)  # given, and written by the original
        check_enough(corpus, mix)
        self.windows = {length: -(-max(1, step_tokens // length) // processes) * processes for length, _ in mix}
        self.steps: list[tuple[int, int]] = []  # length and number of the first window, of every step
        used, taken, total = dict.fromkeys(self.windows, 0), dict.fromkeys(self.windows, 0), 0
        shares = dict(mix)
        for _ in range(steps):
            length = max(shares, key=lambda each: shares[each] * (total + step_tokens) - used[each])
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
        before = math.floor(number * self._share)  # windows of the original's own
        written = math.floor((number + 1) * self._share) > before
        index = before if written else number - before
        return Window(self._begin(length, written, index), index % 2 == 1)

    def _begin(self, length: int, written: bool, number: int) -> int:
        first, stop = self._texts[written]
        count = max(1, (stop - first) // length - 1)
        epoch, index = divmod(number, count)
        key = length, written, epoch
        if key not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if known[:2] != key[:2]}
            draw = np.random.default_rng((self._seed, length, int(written), epoch))
            self._orders[key] = int(draw.integers(0, stop - first - count * length + 1)), draw.permutation(count)
        offset, order = self._orders[key]
        return first + offset + int(order[index]) * length
