"""Text to heal on: tokenised once into a file that all processes map, and cut into windows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mla_convert.core.errors import InputError
from mla_convert.core.files import write_file
from mla_convert.modeling.loss_terms import IGNORED
from mla_convert.source import mixture, texts
from mla_convert.source.tokens import first_tokens

IDS, STARTS, GENERATED, HELD = "tokens.npy", "documents.npy", "generated.npy", "held_out.json"
# Names of the kinds of held-out text: self-generated text, and the given one where it is one without a label.
OWN_KIND, GIVEN_KIND = "self-generated text", "given text"
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
    """All documents, one after another: the self-generated text, whose end is held out; the given texts; their held-out ends.

    Attributes:
        ids: token ids (N,).
        starts: offsets (D,) at which documents begin.
        generated: self-generated tokens.
        held: label of each given text and tokens of its held-out end; these ends are the last tokens, in this order. Empty:
            one given text, of which a fraction is held out.
    """

    ids: np.ndarray
    starts: np.ndarray
    generated: int = 0
    held: tuple[tuple[str, int], ...] = ()

    @property
    def train_end(self) -> int:
        """Offset at which the held-out ends of the given texts begin."""
        return len(self.ids) - sum(tokens for _, tokens in self._held)

    @property
    def _held(self) -> tuple[tuple[str, int], ...]:
        return self.held or ((GIVEN_KIND, _held_out_tokens(len(self.ids) - self.generated)),)

    def held_out_ranges(self) -> Iterator[tuple[str, int, int]]:
        """Label, begin and end of each given text's held-out end."""
        begin = self.train_end
        for label, tokens in self._held:
            yield label, begin, begin + tokens
            begin += tokens

    @property
    def generated_end(self) -> int:
        """Offset at which the held-out end of the self-generated text begins."""
        return self.generated - (_held_out_tokens(self.generated) if self.generated else 0)


def _held_out_tokens(tokens: int, window: int = 0) -> int:
    """Tokens at the end of a text that are held out: a fraction, or a window if a text of at least four has one."""
    return min(HELD_OUT_MAX, max(1, round(tokens * HELD_OUT_FRACTION), min(window, tokens // 4)))


def make_corpus(
    given: str | list[str] | None,
    tokenizer: Any,
    most: int,
    folder: Path,
    joined: bool = False,
    model: texts.Reach = texts.Reach(),  # noqa: B008
    window: int = 0,
) -> list[str]:
    """Tokenise texts into `folder`, in proportion to their weights.

    A text file is one document; a row of a `.jsonl` file, or of a data set (which is streamed), is one each. Where a text
    has fewer tokens than its share, those that follow it give more.

    Args:
        given: names the texts, as `mixture.parts` reads them.
        tokenizer: of the model.
        most: tokens at most, about; of a longer file, pieces from all over it are taken.
        folder: made if it is not there.
        joined: rows are parts of one document.
        model: limits of the token ids.
        window: tokens of the longest window: a held-out end has as many if its text is long enough.

    Returns:
        The texts' labels.

    Raises:
        InputError, ResourceError: as `texts.load_documents`; or a text with no two tokens, or with one that `model` has no
            embedding for.
    """
    parts = mixture.parts(given, "training")
    trained, ends, starts, held = [], [], [], []
    left = most
    for index, part in enumerate(parts):
        share = mixture.quotas([each.weight for each in parts[index:]], left)[0]
        ids, own_starts, label = _tokens(part.spec, tokenizer, share, joined, model)
        left -= len(ids)
        cut = len(ids) - _held_out_tokens(len(ids), window)
        starts += [sum(map(len, trained)) + own_starts[own_starts < cut]]
        held.append((label, len(ids) - cut, own_starts[own_starts >= cut] - cut))
        trained.append(ids[:cut])
        ends.append(ids[cut:])
    # The held-out ends come last, so that one offset, `train_end`, keeps all of them out of training.
    offset = sum(map(len, trained))
    for _, tokens, own_starts in held:
        starts.append(offset + own_starts)
        offset += tokens
    folder.mkdir(parents=True, exist_ok=True)
    labels = [label for label, _, _ in held]
    # files of one name in several folders
    names = [label if labels.count(label) == 1 else f"{label} ({n})" for n, label in enumerate(labels, start=1)]
    kinds = tuple((name, tokens) for name, (_, tokens, _) in zip(names, held, strict=True))
    save_corpus(folder, np.concatenate(trained + ends), np.concatenate(starts).astype(np.int64), held=kinds)
    return labels


def _tokens(
    spec: str, tokenizer: Any, most: int, joined: bool, model: texts.Reach
) -> tuple[np.ndarray, np.ndarray, str]:
    """Token ids (N,) of a text, offsets of its documents, and its label; see `make_corpus`."""
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
    return np.concatenate(parts)[:most], np.asarray(starts, dtype=np.int64), label


def add_generated(folder: Path, ids: np.ndarray) -> None:
    """Put self-generated text before the texts that `make_corpus` wrote, as one document.

    Args:
        folder: of the corpus.
        ids: token ids (N,).
    """
    corpus = open_corpus(folder)
    # One start for all generated texts, which then see each other: for a distillation any context is as good, and
    # windows of one document need no mask.
    starts = np.concatenate([[0], corpus.starts + len(ids)]).astype(np.int64)
    every = np.concatenate([ids.astype(np.int32), corpus.ids])
    save_corpus(folder, every, starts, corpus.generated + len(ids), corpus.held)


def save_corpus(
    folder: Path, ids: np.ndarray, starts: np.ndarray, generated: int = 0, held: tuple[tuple[str, int], ...] = ()
) -> None:
    """Write a corpus, file by file under a temporary name; for the arguments see `Corpus`."""
    write_file(folder / HELD, json.dumps(held))
    for name, array in ((STARTS, starts), (IDS, ids), (GENERATED, np.asarray(generated))):
        temporary = folder / f".{os.getpid()}.{name}"
        np.save(temporary, array)
        os.replace(temporary, folder / name)


def needed_tokens(tokens: int) -> int:
    """Tokens of text for a run over `tokens` tokens: each at most once, and the held-out end."""
    return round(tokens * (1 + 2 * HELD_OUT_FRACTION)) + (1 << 12)


def open_corpus(folder: Path) -> Corpus:
    """Map the corpus that `make_corpus` wrote."""
    held = tuple((label, tokens) for label, tokens in json.loads((folder / HELD).read_text(encoding="utf-8")))
    return Corpus(
        np.load(folder / IDS, mmap_mode="r"), np.load(folder / STARTS), int(np.load(folder / GENERATED)), held
    )


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
            # A line end seldom lies inside a token, so a cut there changes few tokens. It is looked for in the second
            # half alone, so that no piece is short.
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
    # Twice what the guess asks for, which is enough for texts with up to twice as many characters in a token.
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
        # A document that begins with the window has nothing before it to be kept apart from.
        first, last = np.searchsorted(corpus.starts, [begin + 1, begin + length])
        for start in corpus.starts[first:last] - begin:
            packed = True
            labels[row, start - 1] = IGNORED
            positions[row, start:] = np.arange(length - start)
    # Windows of one document run without a mask and can be captured in a CUDA graph: their positions are left out.
    return Batch(*map(torch.from_numpy, (ids, labels)), torch.from_numpy(positions) if packed else None)


def noised(batch: Batch, fraction: float, vocabulary: Tensor, keys: list[tuple[int, ...] | None]) -> Batch:
    """Replace tokens of some windows by random ones.

    As in calibration (`tokens.noised`), contexts that no text contains keep the model from specialising in the text at
    hand.

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
            # The first token stays: it is the attention sink of the whole window.
            chosen[0] = False
            ids[row, chosen] = vocabulary[torch.from_numpy(draw.integers(0, len(vocabulary), int(chosen.sum())))]
            # A random token cannot be predicted.
            labels[row, :-1][chosen[1:]] = IGNORED
    return Batch(ids, labels, batch.positions)


def held_out(corpus: Corpus, length: int, self_fraction: float = 0.0, most: int = HELD_OUT_MAX) -> dict[str, list[int]]:
    """Offsets of the windows that are never trained on, by the kind of text; a text that is too short for one has none.

    Args:
        corpus: whose given texts and self-generated text all have a held-out end.
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
    given = [part for part in corpus.held_out_ranges() if part[2] - part[1] >= length]
    # An equal part for every given text, whatever its weight in training: the kept state is the best on the kind whose
    # loss is largest.
    parts = [(*part, (1 - self_fraction) / len(given)) for part in given]
    if self_fraction:
        parts.append((OWN_KIND, corpus.generated_end, corpus.generated, self_fraction))
    offsets = {}
    for label, begin, end, fraction in parts:
        windows = range(begin, end - length + 1, length)
        count = min(len(windows), max(1, round(most * fraction / length)))
        if count:
            offsets[label] = [windows[index * len(windows) // count] for index in range(count)]
    return offsets


def evaluations(tokens: int, most: int) -> tuple[int, int]:
    """Number and size of the held-out evaluations of a run, which together take about a twelfth of its time.

    Args:
        tokens: that are trained on.
        most: evaluations.

    Returns:
        The number of evaluations, and tokens in each.
    """
    budget = EVALUATED_FRACTION * tokens
    # A short run has fewer evaluations, rather than ones on few tokens.
    count = min(most, max(EVALUATIONS_MIN, int(budget // EVALUATION_MIN)))
    return count, min(HELD_OUT_MAX, max(EVALUATION_MIN, round(budget / count)))


def held_length(corpus: Corpus, length: int) -> int:
    """Tokens of a held-out window: `length`, or all that are held out of the longest given text if they are fewer."""
    return min(length, max(end - begin for _, begin, end in corpus.held_out_ranges()))


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
    # Called for its error, which is raised where no held-out window fits.
    held_out(corpus, mix[0][0])
