"""The packaged suite: a few windows of each of several kinds of text, and how far a converted model is from its original there.

Perplexity on one text hides what a conversion loses on others: at half of the cache a model that loses 5% on WikiText-2 may be
at twice its perplexity on text that it knows by heart. So both are measured on every kind, and the worst one is the headline.
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
from mla_convert.core.report_schema import LARGEST
from mla_convert.core.settings import Settings
from mla_convert.evaluate.quality.kinds import KINDS
from mla_convert.evaluate.quality.perplexity import Scores, mean, perplexity, ratio
from mla_convert.source.tokens import first_tokens, tokenise

# Windows of a kind and tokens in one, by whether there is a GPU. On a CPU all kinds together are an eighth of 40 windows of 2048.
DEFAULT = {True: (4, 1024), False: (2, 512)}
PERCENTILE = 0.99


@dataclass(frozen=True)
class Suite:
    """Token windows (N, L) of all kinds, one kind after another; `kinds` says how many of them each has, in order."""

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
    """Windows of each kind and tokens in one: what was asked for, or what is a small part of the evaluation's own work."""
    count, length = DEFAULT[on_gpu]
    return (min(count, eval_windows) if windows is None else windows), min(length, eval_length)


def suite_size(config: Settings, on_gpu: bool, eval_length: int) -> tuple[int, int]:
    """Windows of all kinds together at most, and tokens in one: for those who reckon what they cost."""
    count, length = size(config.suite_windows, on_gpu, config.eval_windows, eval_length)
    return count * len(KINDS), length


def load_suite(tokenizer: Any, count: int, length: int) -> Suite | None:
    """Up to `count` windows of `length` tokens of each kind, spread evenly over its text; None for no windows.

    Each begins as the tokenizer begins a text. A kind that does not fill one window is left out.
    """
    if not count:
        return None
    prefix, windows, kinds, templated = first_tokens(tokenizer), [], {}, False
    body = length - len(prefix)
    for kind in KINDS:
        text, by_template = load_kind(kind, tokenizer)
        templated |= by_template
        ids = tokenise(tokenizer, text, special=False)
        found = min(count, len(ids) // body)
        if found:
            kinds[kind] = found
            starts = [index * (len(ids) // found) for index in range(found)]
            windows += [prefix + ids[start : start + body] for start in starts]
    return Suite(torch.tensor(windows), kinds, count, templated) if windows else None


def suite_of(
    tokenizer: Any, windows: int | None, on_gpu: bool, evaluation: Tensor, report: dict[str, Any] | None = None
) -> Suite | None:
    """The suite for a run with evaluation windows (n, L): as the model's report has it where nothing is asked for."""
    count, length = size(windows, on_gpu, *evaluation.shape)
    known = look_up(report, "evaluation.suite") if report else None
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


def dialogues(conversations: list[list[dict[str, str]]], tokenizer: Any) -> tuple[str, bool]:
    """Conversations as the model's chat template writes them, and whether it has one that can: else as plain text."""
    if getattr(tokenizer, "chat_template", None):
        try:
            return "".join(tokenizer.apply_chat_template(each, tokenize=False) for each in conversations), True
        except Exception:  # a template raises what it likes: Gemma's knows no system turn, for one
            merged = [_without_system(each) for each in conversations]
        try:
            return "".join(tokenizer.apply_chat_template(each, tokenize=False) for each in merged), True
        except Exception:  # the report says that dialogue is plain text then
            pass
    turns = ("\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in each) for each in conversations)
    return "\n\n\n".join(turns), False


def _without_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The system's words put before the user's first."""
    if messages[0]["role"] != "system":
        return messages
    first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def suite_section(suite: Suite, scores: Scores) -> dict[str, Any]:
    """What a report says of the suite, from the scores of its windows (N, L-1), the model's losses among them.

    KL and agreement over all kinds are means of the kinds' own, so that the kind with most windows does not decide.
    """
    kinds, first = {}, 0
    for kind, count in suite.kinds.items():
        kinds[kind] = _kind(scores, slice(first, first + count))
        first += count
    found = {"protocol": suite.protocol, "windows": suite.asked, "length": suite.windows.shape[1], "kinds": kinds}
    if scores.original is None:
        return found
    worst = max(kinds, key=lambda kind: _rank(kinds[kind]["ratio"]))
    over = {
        key: {"value": sum(each[key]["value"] for each in kinds.values()) / len(kinds)} for key in ("kl", "agreement")
    }
    return {**found, "worst": {"kind": worst, "ratio": kinds[worst]["ratio"]}, **over}


def _rank(value: float) -> float:
    """NaN is worse than anything."""
    return value if value == value else float("inf")


def _shown(value: float) -> float:
    """A perplexity or a ratio; beyond LARGEST it says nothing, and counts as infinite."""
    return value if value < LARGEST else math.inf


def _side(losses: Tensor) -> dict[str, Any]:
    found = perplexity(losses).as_dict()
    return {**found, "value": _shown(found["value"])}


def _kind(scores: Scores, part: slice) -> dict[str, Any]:
    entry: dict[str, Any] = {"after": _side(scores.losses[part])}
    if scores.original is None:
        return entry
    over, kl = ratio(scores.losses[part], scores.original[part]), mean(scores.kl[part])
    agreement = mean(scores.agreement[part])
    return {
        "before": _side(scores.original[part]),
        **entry,
        "ratio": _shown(over.value),
        "ratio_log_error": over.error,
        "kl": {"value": kl.value, "error": kl.error, "p99": float(scores.kl[part].double().quantile(PERCENTILE))},
        "agreement": {"value": agreement.value, "error": agreement.error},
    }
