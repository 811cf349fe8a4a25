"""Passkey retrieval: a five-digit key stands somewhere in a long text, and the model is asked for it at the end.

Two figures: whether greedy generation gives the key, and the log-probability of the key's tokens, which says something of
models too small to find it as well. The prompt is read at once; the key is read off token by token through the cache.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from mla_convert.core.errors import InputError
from mla_convert.evaluate.quality.greedy_agreement import Decoder
from mla_convert.evaluate.quality.perplexity import Mean, mean
from mla_convert.source import texts

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEYS = 2  # for each length and depth
STEP, SHORTEST = 4, 512  # of the ladder of lengths
NEEDLE = "The pass key is {key}. Remember it."
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Prompt:
    """Tokens that end where the key is to follow, and the key's tokens."""

    length: int
    depth: float
    ids: list[int]
    key: list[int]


@dataclass(frozen=True)
class Found:
    """What a model made of one prompt: whether greedy generation gives the key, and the key's log-probability in nats."""

    match: bool
    log_probability: float


def ladder(longest: int) -> list[int]:
    """Lengths up to `longest`, each four times the one before, from about 512 tokens on."""
    found = [longest]
    while found[-1] // STEP >= SHORTEST:
        found.append(found[-1] // STEP)
    return found[::-1]


def make_prompts(tokenizer: Any, lengths: list[int], seed: int) -> list[Prompt]:
    """Prompts of every length and depth, `KEYS` of each, the same for the same seed. With its key none is longer than named.

    The filler is the packaged evaluation text, its sentences without digits, over again where it ends.

    Raises:
        InputError: a length that not even the key and the question fit into.
    """
    filler, draw = _sentences(tokenizer), random.Random(seed)
    # A tokenizer may put special tokens before a text and after it; a prompt goes on, so it has only those before.
    start = _shared(*(tokenizer(word, verbose=False)["input_ids"] for word in ("The", "Yet")))
    prompts = []
    for length, depth, _ in itertools.product(lengths, DEPTHS, range(KEYS)):
        number = draw.randint(10000, 99999)
        needle = _ids(tokenizer, f"{NEEDLE.format(key=number)}\n")
        asked, answered = (_ids(tokenizer, QUESTION + key) for key in ("", f" {number}"))
        asked = _shared(asked, answered)
        key = answered[len(asked) :]
        room = length - len(start) - len(needle) - len(answered)
        if room < 0:
            raise InputError(f"a context of {length} tokens is too short for a pass key: {length - room} are needed")
        sentences, used = [], 0
        for index in itertools.count(draw.randrange(len(filler))):
            sentence = filler[index % len(filler)]
            if used + len(sentence) > room:
                break
            sentences.append(sentence)
            used += len(sentence)
        sentences.insert(round(depth * len(sentences)), needle)
        prompts.append(Prompt(length, depth, [*start, *itertools.chain(*sentences), *asked], key))
    return prompts


def _sentences(tokenizer: Any) -> list[list[int]]:
    """Tokens of every sentence of the filler, each with the line's end after it."""
    text, _ = texts.load_text(texts.SHIPPED["evaluation"], "evaluation")
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.?!])\s+|\n\n", text)]
    return [_ids(tokenizer, f"{part}\n") for part in found if part.endswith(".") and not re.search(r"\d", part)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _shared(first: list[int], second: list[int]) -> list[int]:
    """The beginning that two lists have in common: where a text ends, tokens may join over to what follows."""
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]


def retrieve(model: nn.Module, prompts: list[Prompt], tick: Callable[[int, int], None] | None = None) -> list[Found]:
    """What a model makes of every prompt."""
    found = []
    for index, prompt in enumerate(prompts):
        decoder, match, total = Decoder(model, prompt.ids), True, 0.0
        for at, token in enumerate(prompt.key):
            scores = decoder.logits.log_softmax(-1)
            total += float(scores[token])
            # Greedy generation gives the key exactly if each of its tokens is the likeliest after those before it.
            match = match and int(scores.argmax()) == token
            if at + 1 < len(prompt.key):
                decoder.feed(token)
        found.append(Found(match, total))
        if tick:
            tick(index + 1, len(prompts))
    return found


def summarise(prompts: list[Prompt], original: list[Found] | None, model: list[Found], seed: int) -> dict[str, Any]:
    """As in report.json, of both models: the share of keys found and the mean log-probability.

    `lengths` has them for every length with their standard error over its prompts, `results` for every length and depth.
    """

    def figures(found: list[Found] | None, length: int, depth: float | None = None) -> dict[str, Mean] | None:
        if found is None:
            return None
        own = [each for prompt, each in zip(prompts, found, strict=True)
               if prompt.length == length and depth in (None, prompt.depth)]  # fmt: skip
        return {name: mean(torch.tensor([[float(getattr(each, name))] for each in own]))
                for name in ("match", "log_probability")}  # fmt: skip

    def sides(length: int, depth: float | None = None) -> dict[str, Any]:
        both = {"before": figures(original, length, depth), "after": figures(model, length, depth)}
        if depth is None:
            return {side: part and {name: asdict(each) for name, each in part.items()} for side, part in both.items()}
        # a handful of keys makes no standard error worth reading
        return {side: part and {name: each.value for name, each in part.items()} for side, part in both.items()}

    cells = list(dict.fromkeys((prompt.length, prompt.depth) for prompt in prompts))
    return {
        "seed": seed,
        "keys": len(prompts) // len(cells),
        "guessing": -math.log(90000),
        "lengths": [{"length": length, **sides(length)} for length in dict.fromkeys(length for length, _ in cells)],
        "results": [{"length": length, "depth": depth, **sides(length, depth)} for length, depth in cells],
    }
