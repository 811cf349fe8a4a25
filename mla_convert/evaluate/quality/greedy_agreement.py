"""Greedy decoding through a model's own KV cache, one token at a time: the path on which a converted model is served.

Nothing is sampled and no generation settings of the model apply, so that two models differ only in what they say.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mla_convert.evaluate.quality.perplexity import Mean, mean
from mla_convert.modeling.caching import with_cache


class Decoder:
    """A model that has read a prompt (at least two tokens) and is fed token by token from there."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, prompt: Sequence[int]):
        self._model, self._cache = model, DynamicCache(config=model.config)
        # Logits of a whole long prompt would need more memory than the model.
        short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._run(prompt[:-1], **short)
        self.logits = self.feed(prompt[-1])

    def _run(self, ids: Sequence[int], **options: Any) -> Tensor:
        given = torch.tensor([list(ids)], device=self._model.device)
        return self._model(input_ids=given, **with_cache(self._model, self._cache), **options).logits[0, -1]

    @torch.no_grad()
    def feed(self, token: int) -> Tensor:
        """Logits (vocabulary,), float32, of what follows one more token."""
        self.logits = self._run([token]).float()
        return self.logits


def continue_greedily(model: nn.Module, prompt: Sequence[int], tokens: int, stop: set[int]) -> list[int]:
    """The most likely next token, `tokens` times or until one of `stop`, which is part of the continuation."""
    decoder, found = Decoder(model, prompt), []
    while True:
        found.append(int(decoder.logits.argmax()))
        if len(found) == tokens or found[-1] in stop:
            return found
        decoder.feed(found[-1])


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end a text, from the model's generation settings and its tokenizer."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


@dataclass(frozen=True)
class Agreement:
    """How alike two models continue prompts: `prefix` is the share of the original's continuation up to the first
    different token, `exact` the share of prompts that they continue alike to the end.
    """

    prompts: int
    prompt_tokens: int
    tokens: int
    prefix: Mean
    exact: Mean


def greedy_prompts(windows: Tensor, count: int) -> Tensor:
    """Prompts (n, P) for greedy continuations: the first half, at most 256 tokens, of each of the first windows."""
    return windows[:count, : max(2, min(windows.shape[1] // 2, 256))]


def compare(prompts: Tensor, tokens: int, original: list[list[int]], model: list[list[int]]) -> Agreement:
    """Agreement of continuations, each with its standard error over prompts."""
    shares = []
    for theirs, ours in zip(original, model, strict=True):
        same = next((at for at, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), len(theirs))
        shares.append(same / len(theirs))
    prefix = torch.tensor(shares, dtype=torch.float64)[:, None]
    return Agreement(*prompts.shape, tokens, mean(prefix), mean((prefix == 1).double()))
