"""The windows of every step of a healing run.

They are a function of the seed and the step's number alone: the same for a run that resumes from a checkpoint, and for
other numbers of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mla_convert.heal.data import Corpus
from mla_convert.heal.windows import check_enough


@dataclass(frozen=True)
class Window:
    """A training window."""

    begin: int  # offset in the corpus
    odd: bool  # odd number among the windows of its kind: the ones that get noise, if there is any


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
            # The length that is furthest behind its fraction of the tokens.
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
        # One window fewer than fit leaves room to begin every pass at another offset.
        count = max(1, (stop - first) // length - 1)
        epoch, index = divmod(number, count)
        key = length, generated, epoch
        if key not in self._orders:
            # A pass is over when the next one begins: only one order of each kind is held.
            self._orders = {known: order for known, order in self._orders.items() if known[:2] != key[:2]}
            draw = np.random.default_rng((self._seed, length, int(generated), epoch))
            self._orders[key] = int(draw.integers(0, stop - first - count * length + 1)), draw.permutation(count)
        offset, order = self._orders[key]
        return first + offset + int(order[index]) * length
