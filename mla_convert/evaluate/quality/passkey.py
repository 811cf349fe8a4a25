"""Passkey retrieval, as in landmark attention (arXiv:2305.16300): a long text hides a key, which is asked for at its end.

Or it hides a key at every depth, and one is asked for by its name (multi-key retrieval, as in RULER, arXiv:2404.06654). Two
measurements: whether greedy generation gives the key, and the log-probability of the key's tokens, which also tells small
models apart that never find it. The prompt is read in one pass; the key is decoded token by token through the cache.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mla_convert.core.errors import InputError
from mla_convert.core.report_schema import Mean, Passkey, PasskeyCell, PasskeyLength, PasskeyMeans, PasskeyValues
from mla_convert.evaluate.quality.greedy_agreement import Decoder
from mla_convert.evaluate.quality.perplexity import mean
from mla_convert.source import texts

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = 2  # prompts for each length and depth
STEP, SHORTEST = 4, 512  # factor between lengths, and the shortest length
NEEDLE = "The pass key{of} is {key}. Remember it."
QUESTION = "What is the pass key{of}? The pass key{of} is"
# Names of several keys, one for each depth.
NAMES = (" of the harbour", " of the library", " of the garden", " of the station", " of the museum")


@dataclass(frozen=True)
class Prompt:
    """A prompt of at most `length` tokens: `ids` end where the key follows; `key` holds the tokens of the one asked for."""

    length: int
    depth: float  # of the key that is asked for
    ids: list[int]
    key: list[int]
    needles: int = 1  # keys in the text


@dataclass(frozen=True)
class Retrieval:
    """A model's result on one prompt: whether greedy generation gives the key, and the key's log-probability in nats."""

    match: bool
    log_probability: float


def ladder(longest: int) -> list[int]:
    """Lengths up to `longest`, each four times the one before, from about 512 tokens on."""
    lengths = [longest]
    while lengths[-1] // STEP >= SHORTEST:
        lengths.append(lengths[-1] // STEP)
    return lengths[::-1]


def make_prompts(tokenizer: Any, lengths: list[int], seed: int) -> list[Prompt]:
    """Prompts of every length and depth, `KEYS` of each, equal for equal seeds. A prompt with its key is at most `length` tokens.

    Those with one key come first, then those with as many keys as there are depths, where they fit. The filler is the
    packaged evaluation text without sentences that hold digits, repeated as needed.

    Raises:
        InputError: key and question alone are longer than a length.
    """
    filler, draw = _sentences(tokenizer), random.Random(seed)
    # A tokenizer may put special tokens before and after a text. A prompt is continued, so it has only those before.
    start = _shared(*(tokenizer(word, verbose=False)["input_ids"] for word in ("The", "Yet")))
    prompts = []
    for several, length, depth, _ in itertools.product((False, True), lengths, DEPTHS, range(KEYS)):
        names = dict(zip(DEPTHS, NAMES, strict=True)) if several else {depth: ""}
        numbers = draw.sample(range(10000, 100000), len(names))
        needles = {at: _ids(tokenizer, f"{NEEDLE.format(of=name, key=number)}\n")
                   for (at, name), number in zip(names.items(), numbers, strict=True)}  # fmt: skip
        question, number = QUESTION.format(of=names[depth]), numbers[[*names].index(depth)]
        asked, answered = (_ids(tokenizer, question + key) for key in ("", f" {number}"))
        asked = _shared(asked, answered)
        key = answered[len(asked) :]
        room = length - len(start) - sum(map(len, needles.values())) - len(answered)
        if room < 0 and several:
            continue
        if room < 0:
            raise InputError(f"a context of {length} tokens is too short for a pass key: {length - room} are needed")
        sentences = _fill(filler, draw.randrange(len(filler)), room)
        # From the end, so that the places of the others do not move.
        for at in sorted(needles, reverse=True):
            sentences.insert(round(at * len(sentences)), needles[at])
        prompts.append(Prompt(length, depth, [*start, *itertools.chain(*sentences), *asked], key, len(names)))
    return prompts


def _fill(filler: list[list[int]], first: int, room: int) -> list[list[int]]:
    """Sentences from number `first` on, of at most `room` tokens together."""
    sentences, used = [], 0
    for index in itertools.count(first):
        sentence = filler[index % len(filler)]
        if used + len(sentence) > room:
            return sentences
        sentences.append(sentence)
        used += len(sentence)
    return sentences


def _sentences(tokenizer: Any) -> list[list[int]]:
    """Tokens of every sentence of the filler, each followed by a line feed."""
    text, _ = texts.load_text(texts.SHIPPED["evaluation"], "evaluation")
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.?!])\s+|\n\n", text)]
    return [_ids(tokenizer, f"{part}\n") for part in sentences if part.endswith(".") and not re.search(r"\d", part)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _shared(first: list[int], second: list[int]) -> list[int]:
    """The common beginning of two lists. The last tokens of a text may change when more text follows."""
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]


def retrieve(
    model: nn.Module, prompts: list[Prompt], tick: Callable[[int, int], None] | None = None
) -> list[Retrieval]:
    """A model's result on every prompt. `tick` is called with the number done and the number of prompts."""
    results = []
    for index, prompt in enumerate(prompts):
        decoder, match, total = Decoder(model, prompt.ids), True, 0.0
        for at, token in enumerate(prompt.key):
            scores = decoder.logits.log_softmax(-1)
            total += float(scores[token])
            # Greedy generation gives the key exactly if each of its tokens is the most likely one after those before it.
            match = match and int(scores.argmax()) == token
            if at + 1 < len(prompt.key):
                decoder.feed(token)
        results.append(Retrieval(match, total))
        if tick:
            tick(index + 1, len(prompts))
    return results


def summarise(prompts: list[Prompt], original: list[Retrieval] | None, model: list[Retrieval], seed: int) -> Passkey:
    """Results of both models in a report: share of keys found and mean log-probability.

    `lengths` has them by length and number of keys with standard errors over prompts, `results` also by depth.
    """

    def means(
        results: list[Retrieval] | None, needles: int, length: int, depth: float | None = None
    ) -> dict[str, Mean] | None:
        if results is None:
            return None
        chosen = [result for prompt, result in zip(prompts, results, strict=True)
                  if (prompt.needles, prompt.length) == (needles, length) and depth in (None, prompt.depth)]  # fmt: skip
        return {name: mean(torch.tensor([[float(getattr(result, name))] for result in chosen]))
                for name in ("match", "log_probability")}  # fmt: skip

    def by_length(needles: int, length: int) -> PasskeyLength:
        before, after = (means(results, needles, length) for results in (original, model))
        return PasskeyLength(
            length=length, needles=needles, before=before and PasskeyMeans(**before), after=PasskeyMeans(**after)
        )

    def by_depth(needles: int, length: int, depth: float) -> PasskeyCell:
        # A few keys give no meaningful standard error.
        sides = [means(results, needles, length, depth) for results in (original, model)]
        before, after = (side and PasskeyValues(**{name: each.value for name, each in side.items()}) for side in sides)
        return PasskeyCell(length=length, depth=depth, needles=needles, before=before, after=after)

    cells = list(dict.fromkeys((prompt.needles, prompt.length, prompt.depth) for prompt in prompts))
    return Passkey(
        seed=seed,
        keys=len(prompts) // len(cells),
        guessing=-math.log(90000),
        lengths=[by_length(*pair) for pair in dict.fromkeys((needles, length) for needles, length, _ in cells)],
        results=[by_depth(*cell) for cell in cells],
    )
