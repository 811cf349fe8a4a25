"""Windows of a corpus: batches of training steps, and those that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mla_convert.core.errors import InputError
from mla_convert.heal.data import HELD_OUT_MAX, OWN_KIND, Corpus
from mla_convert.modeling.loss_terms import IGNORED

# Tokens of all held-out evaluations, as a fraction of the training's; least tokens of one evaluation; least evaluations.
EVALUATED_FRACTION, EVALUATION_MIN, EVALUATIONS_MIN = 0.2, 1 << 12, 4


@dataclass(frozen=True)
class Batch:
    """Windows (B, L) of a training step."""

    ids: Tensor
    labels: Tensor  # the token that follows each, or IGNORED
    positions: Tensor | None  # where a window holds more than one document
    counted: Tensor | None = None  # where the loss does not count every position: those that it counts

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        parts = self.ids, self.labels, self.positions, self.counted
        return Batch(*(None if each is None else each.to(device, non_blocking=True) for each in parts))


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
    counted = None
    if corpus.counted is not None:
        # A position counts where the token that follows it is one of an answer, in the same document.
        following = np.zeros(ids.shape, dtype=bool)
        following[:, :-1] = np.stack([corpus.counted[begin + 1 : begin + length] for begin in begins])
        # Of other text the last position, which has no label, counts too, as in a corpus without conversations.
        following[:, -1] = following[:, -2]
        if not following.all():
            labels[~following] = IGNORED
            counted = torch.from_numpy(following)
    # Windows of one document run without a mask and can be captured in a CUDA graph: their positions are left out.
    return Batch(*map(torch.from_numpy, (ids, labels)), torch.from_numpy(positions) if packed else None, counted)


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
    return Batch(ids, labels, batch.positions, batch.counted)


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
        windows: Sequence[int] = range(begin, end - length + 1, length)
        if corpus.counted is not None:
            # A window of a long prompt has nothing that counts, and a loss of 0 would say that nothing was lost.
            windows = [window for window in windows if corpus.counted[window + 1 : window + length].any()]
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
