"""The packaged suite: a few windows of each of several kinds of text, on which a model is compared with its original.

Perplexity on one text hides losses on others: at half of the cache, a model that loses 5% on WikiText-2 may double its
perplexity on text that the original memorised. Both models are therefore measured on every kind; the worst comes first.
"""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from mla_convert.core.report_file import look_up
from mla_convert.core.report_schema import Divergence, JsonObject, KindEntry, Mean, SuiteSection, WorstKind
from mla_convert.core.settings import Settings
from mla_convert.evaluate.quality.kinds import KINDS
from mla_convert.evaluate.quality.perplexity import Scores, mean, perplexity, ratio
from mla_convert.source.chat import dialogues
from mla_convert.source.tokens import first_tokens, tokenise

# Windows of a kind and tokens in one, by whether there is a GPU. On a CPU all kinds together are an eighth of 40 windows of 2048.
DEFAULT = {True: (4, 1024), False: (2, 512)}
PERCENTILE = 0.99


@dataclass(frozen=True)
class Suite:
    """Windows of all kinds of text.

    Attributes:
        windows: token ids (N, L), one kind after another.
        kinds: number of windows by kind, in that order.
        asked: number of windows of each kind that were asked for.
        templated: whether dialogue is in the model's chat template.
    """

    windows: Tensor
    kinds: dict[str, int]
    asked: int
    templated: bool

    @property
    def protocol(self) -> str:
        """The windows in words."""
        dialogue = (
            "in the model's chat template" if self.templated else "as plain text, for the model has no chat template"
        )
        return (
            f"{len(self.kinds)} packaged with mla_convert, {self.asked} window{'s' if self.asked > 1 else ''} of "
            f"{self.windows.shape[1]} tokens of each (fewer where a text is shorter), dialogue {dialogue}"
        )


def size(windows: int | None, on_gpu: bool, eval_windows: int, eval_length: int) -> tuple[int, int]:
    """Windows of each kind and tokens in a window: as asked for, or a small part of the evaluation's own work."""
    count, length = DEFAULT[on_gpu]
    return (min(count, eval_windows) if windows is None else windows), min(length, eval_length)


def suite_size(config: Settings, on_gpu: bool, eval_length: int) -> tuple[int, int]:
    """Windows of all kinds together at most, and tokens in a window, for estimates of time and memory."""
    count, length = size(config.suite_windows, on_gpu, config.eval_windows, eval_length)
    return count * len(KINDS), length


def load_suite(tokenizer: Any, count: int, length: int) -> Suite | None:
    """Up to `count` windows of `length` tokens of each kind, spread evenly over its text; None for no windows.

    Each window begins with the tokens that the tokenizer puts before a text. A kind that does not fill one window is left out.
    """
    if not count:
        return None
    prefix, windows, kinds, templated = first_tokens(tokenizer), [], {}, False
    body = length - len(prefix)
    for kind in KINDS:
        text, by_template = load_kind(kind, tokenizer)
        templated |= by_template
        # Every window gets the prefix, not only the one at the beginning of the text.
        ids = tokenise(tokenizer, text, special=False)
        fitting = min(count, len(ids) // body)
        if fitting:
            kinds[kind] = fitting
            starts = [index * (len(ids) // fitting) for index in range(fitting)]
            windows += [prefix + ids[start : start + body] for start in starts]
    return Suite(torch.tensor(windows), kinds, count, templated) if windows else None


def suite_of(
    tokenizer: Any, windows: int | None, on_gpu: bool, evaluation: Tensor, report: JsonObject | None = None
) -> Suite | None:
    """The suite for a run with evaluation windows (n, L); where `windows` is None, of the size that the model's report states."""
    count, length = size(windows, on_gpu, *evaluation.shape)
    known = look_up(report, "evaluation.suite") if report else None
    # As the conversion measured, so that its figures can be compared.
    if windows is None and isinstance(known, dict):
        count, length = known.get("windows", count), known.get("length", length)
    return load_suite(tokenizer, count, length)


def load_kind(kind: str, tokenizer: Any) -> tuple[str, bool]:
    """The text of a kind, and whether a chat template made it."""
    folder = resources.files("mla_texts") / "suite"
    if kind != "dialogue":
        return gzip.decompress((folder / f"{kind}.txt.gz").read_bytes()).decode("utf-8"), False
    lines = gzip.decompress((folder / "dialogue.jsonl.gz").read_bytes()).decode("utf-8").splitlines()
    return dialogues([json.loads(line)["messages"] for line in lines if line.strip()], tokenizer)


def suite_section(suite: Suite, scores: Scores) -> SuiteSection:
    """The suite in a report, from the scores (N, L-1) of its windows.

    KL and agreement of the suite are means of the kinds' means, so that kinds with more windows have no more weight.
    """
    kinds, first = {}, 0
    for kind, count in suite.kinds.items():
        kinds[kind] = _kind(scores, slice(first, first + count))
        first += count
    section = SuiteSection(protocol=suite.protocol, windows=suite.asked, length=suite.windows.shape[1], kinds=kinds)
    if scores.original is not None:
        worst = max(kinds, key=lambda kind: _rank(kinds[kind].ratio))
        section.worst = WorstKind(kind=worst, ratio=kinds[worst].ratio)
        section.kl = Mean(value=sum(entry.kl.value for entry in kinds.values()) / len(kinds))
        section.agreement = Mean(value=sum(entry.agreement.value for entry in kinds.values()) / len(kinds))
    return section


def _rank(ratio: float) -> float:
    """NaN counts as the worst ratio."""
    return math.inf if math.isnan(ratio) else ratio


def _kind(scores: Scores, part: slice) -> KindEntry:
    after = perplexity(scores.losses[part])
    if scores.original is None:
        return KindEntry(after=after)
    quotient, kl = ratio(scores.losses[part], scores.original[part]), mean(scores.kl[part])
    return KindEntry(
        before=perplexity(scores.original[part]),
        after=after,
        ratio=quotient.value,
        ratio_log_error=quotient.error,
        kl=Divergence(value=kl.value, error=kl.error, p99=float(scores.kl[part].double().quantile(PERCENTILE))),
        agreement=mean(scores.agreement[part]),
    )
