"""Text to heal on: tokenised once into a file that all processes map."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mla_convert.core.errors import InputError
from mla_convert.core.files import write_file
from mla_convert.source import mixture, texts
from mla_convert.source.conversations import answers, load_conversations
from mla_convert.source.tokens import first_tokens

IDS, STARTS, GENERATED, HELD = "tokens.npy", "documents.npy", "generated.npy", "held_out.json"
COUNTED = "counted.npy"
# Names of the kinds of held-out text: self-generated text, and the given one where it is one without a label.
OWN_KIND, GIVEN_KIND = "self-generated text", "given text"
# Fraction of the data, at its end, that is never trained on; most tokens of it in one evaluation.
HELD_OUT_FRACTION, HELD_OUT_MAX = 1 / 20, 1 << 17
# Parts of a text that are tokenised first, to tell how much of it is needed.
SAMPLED = 64
# Times that conversations of a task are repeated at most, to weigh as much as the texts: more would learn few of them by heart.
TASK_PASSES = 8
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
        counted: which tokens (N,) the loss counts, where that is not all.
    """

    ids: np.ndarray
    starts: np.ndarray
    generated: int = 0
    held: tuple[tuple[str, int], ...] = ()
    counted: np.ndarray | None = None

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
    task: str | list[str] | None = None,
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
        task: names conversations, of which only the answers count; together they weigh as much as the texts, and are
            repeated up to TASK_PASSES times for it.

    Returns:
        The texts' labels.

    Raises:
        InputError, ResourceError: as `texts.load_documents`; or a text with no two tokens, or with one that `model` has no
            embedding for.
    """
    parts = mixture.parts(given, "training")
    weights, asked = [part.weight for part in parts], mixture.parts(task, "task") if task else []
    weights += [part.weight * sum(weights) / sum(each.weight for each in asked) for part in asked]
    trained, ends, starts, held = [], [], [], []
    counts: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    left = most
    for index, part in enumerate([*parts, *asked]):
        share = mixture.quotas(weights[index:], left)[0]
        if index < len(parts):
            ids, own_starts, label = _tokens(part.spec, tokenizer, share, joined, model)
            counted = np.ones(len(ids), dtype=bool)
        else:
            ids, own_starts, label, counted = _answers(part.spec, tokenizer, share, model)
        left -= len(ids)
        cut = len(ids) - _held_out_tokens(len(ids), window)
        times = 1
        if index >= len(parts):
            # As many tokens as the texts have, in proportion to the weights.
            wanted = sum(map(len, trained[: len(parts)])) * asked[index - len(parts)].weight
            times = round(wanted / sum(each.weight for each in asked) / max(cut, 1))
            times = min(max(times, 1), TASK_PASSES)
        own = own_starts[own_starts < cut]
        starts += [sum(map(len, trained)) + time * cut + own for time in range(times)]
        held.append((label, len(ids) - cut, own_starts[own_starts >= cut] - cut))
        trained.append(np.tile(ids[:cut], times))
        ends.append(ids[cut:])
        counts[0].append(np.tile(counted[:cut], times))
        counts[1].append(counted[cut:])
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
    every = np.concatenate(counts[0] + counts[1]) if asked else None
    save_corpus(
        folder, np.concatenate(trained + ends), np.concatenate(starts).astype(np.int64), held=kinds, counted=every
    )
    return labels


def _tokens(
    spec: str, tokenizer: Any, most: int, joined: bool, model: texts.Reach
) -> tuple[np.ndarray, np.ndarray, str]:
    """Token ids (N,) of a text, offsets of its documents, and its label; see `make_corpus`."""
    documents, label = texts.load_documents(spec, joined, tokenizer)
    if isinstance(documents, list):
        documents = _thinned(documents, most, tokenizer)
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


def _answers(
    spec: str, tokenizer: Any, most: int, model: texts.Reach
) -> tuple[np.ndarray, np.ndarray, str, np.ndarray]:
    """As `_tokens`, of conversations, and which tokens belong to an answer."""
    rows, label = load_conversations(spec)
    if isinstance(rows, list):
        sizes = [len(json.dumps(row, ensure_ascii=False)) for row, _ in rows]
        rows = _spread(rows, sizes, most, lambda sample: sum(len(ids) for ids, _ in answers(sample, tokenizer)))
    parts, marks, starts, total = [], [], [], 0
    for ids, marked in answers(rows, tokenizer):
        starts.append(total)
        parts.append(np.asarray(ids, dtype=np.int32))
        marks.append(np.asarray(marked, dtype=bool))
        total += len(ids)
        if total >= most:
            break
    if not parts:
        raise InputError(f"{label} has no conversation")
    every = np.concatenate(parts)
    model.check(torch.from_numpy(every), label)
    return every[:most], np.asarray(starts, dtype=np.int64), label, np.concatenate(marks)[:most]


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
    counted = corpus.counted
    if counted is not None:
        counted = np.concatenate([np.ones(len(ids), dtype=bool), counted])
    save_corpus(folder, every, starts, corpus.generated + len(ids), corpus.held, counted)


def save_corpus(
    folder: Path,
    ids: np.ndarray,
    starts: np.ndarray,
    generated: int = 0,
    held: tuple[tuple[str, int], ...] = (),
    counted: np.ndarray | None = None,
) -> None:
    """Write a corpus, file by file under a temporary name; for the arguments see `Corpus`."""
    write_file(folder / HELD, json.dumps(held))
    arrays = {STARTS: starts, IDS: ids, GENERATED: np.asarray(generated), COUNTED: counted}
    for name, array in arrays.items():
        if array is None:
            continue
        temporary = folder / f".{os.getpid()}.{name}"
        np.save(temporary, array)
        os.replace(temporary, folder / name)


def needed_tokens(tokens: int) -> int:
    """Tokens of text for a run over `tokens` tokens: each at most once, and the held-out end."""
    return round(tokens * (1 + 2 * HELD_OUT_FRACTION)) + (1 << 12)


def open_corpus(folder: Path) -> Corpus:
    """Map the corpus that `make_corpus` wrote."""
    held = tuple((label, tokens) for label, tokens in json.loads((folder / HELD).read_text(encoding="utf-8")))
    counted = np.load(folder / COUNTED, mmap_mode="r") if (folder / COUNTED).exists() else None
    ids, starts = np.load(folder / IDS, mmap_mode="r"), np.load(folder / STARTS)
    return Corpus(ids, starts, int(np.load(folder / GENERATED)), held, counted)


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


def _thinned(documents: list[str], most: int, tokenizer: Any) -> list[str]:
    """Everything, or pieces at even distances with about `most` tokens."""
    parts = [piece for document in documents for piece in pieces(document)]

    def tokens(sample: list[str]) -> int:
        return sum(map(len, tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]))

    found = _spread(parts, list(map(len, parts)), most, tokens)
    return documents if found is parts else found


def _spread(parts: list[Any], characters: list[int], most: int, tokens: Callable[[list[Any]], int]) -> list[Any]:
    """All parts, or as many at even distances as have `most` tokens, and a tenth more: what is taken of it is its beginning.

    Args:
        parts: in the order of the file.
        characters: of each.
        most: tokens wanted.
        tokens: tokens of a sample of the parts.
    """
    places = [index * len(parts) // SAMPLED for index in range(SAMPLED)] if len(parts) > SAMPLED else range(len(parts))
    wanted = (
        1.1 * most * sum(characters[place] for place in places) / max(tokens([parts[place] for place in places]), 1)
    )
    count = max(1, math.ceil(len(parts) * wanted / max(sum(characters), 1)))
    return [parts[index * len(parts) // count] for index in range(count)] if count < len(parts) else parts
