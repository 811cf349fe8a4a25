"""Greedy continuations of two models, each through its own KV cache as it is served, and how far they agree.

Nothing is sampled and the model's generation settings do not apply, so continuations of two models differ only by the models.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mla_convert.core.report_schema import Continuations, Greedy
from mla_convert.evaluate.quality.perplexity import mean
from mla_convert.modeling.caching import with_cache

# Tokens of a sequence that counts as repeated when it occurs again in its continuation.
SEQUENCE = 4


class Decoder:
    """A model with its cache. `logits` (vocabulary,), float32, predict the token after those that it was fed.

    Args:
        model: a causal language model.
        prompt: at least two token ids, read at once.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, prompt: Sequence[int]):
        """Read the prompt."""
        self._model, self._cache = model, DynamicCache(config=model.config)
        # Logits of all positions of a long prompt can need more memory than the model.
        short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        # The last token goes alone, as every later one does: the first logits, too, are those of decoding through the
        # cache.
        self._run(prompt[:-1], **short)
        self.logits = self.feed(prompt[-1])

    def _run(self, ids: Sequence[int], **options: Any) -> Tensor:
        given = torch.tensor([list(ids)], device=self._model.device)
        return self._model(input_ids=given, **with_cache(self._model, self._cache), **options).logits[0, -1]

    @torch.no_grad()
    def feed(self, token: int) -> Tensor:
        """Feed one token; returns the logits (vocabulary,), float32, of the next one."""
        self.logits = self._run([token]).float()
        return self.logits


def continue_greedily(model: nn.Module, prompt: Sequence[int], tokens: int, stop: set[int]) -> list[int]:
    """The greedy continuation of a prompt: `tokens` token ids, or fewer up to the first of `stop`, which is included."""
    decoder, continuation = Decoder(model, prompt), []
    while True:
        continuation.append(int(decoder.logits.argmax()))
        if len(continuation) == tokens or continuation[-1] in stop:
            return continuation
        decoder.feed(continuation[-1])


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end a text, from the model's generation settings and its tokenizer."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def greedy_prompts(windows: Tensor, count: int) -> Tensor:
    """Prompts (n, P) for greedy continuations: the first half, at most 256 tokens, of each of the first windows."""
    return windows[:count, : max(2, min(windows.shape[1] // 2, 256))]


def compare(
    prompts: Tensor, tokens: int, original: list[list[int]], model: list[list[int]], text: str, protocol: str
) -> Greedy:
    """Agreement of continuations, with standard errors over prompts.

    Args:
        prompts: token ids (n, P).
        tokens: tokens in a continuation at most.
        original: continuations by the original.
        model: continuations by the converted model.
        text: label of the text that the prompts are from.
        protocol: the windows whose beginnings are the prompts.
    """
    shares = []
    for reference, continuation in zip(original, model, strict=True):
        # One of the two may have ended before the other.
        pairs = enumerate(zip(reference, continuation, strict=False))
        same = next((at for at, (first, second) in pairs if first != second), len(reference))
        shares.append(same / len(reference))
    prefix = torch.tensor(shares, dtype=torch.float64)[:, None]
    count, length = prompts.shape
    return Greedy(text=text, protocol=protocol, prompts=count, prompt_tokens=length, tokens=tokens, prefix=mean(prefix),
                  exact=mean((prefix == 1).double()), before=describe(original), after=describe(model))  # fmt: skip


def describe(continuations: list[list[int]]) -> Continuations:
    """Length and repetition of continuations: a damaged model repeats itself, or does not end."""
    lengths, repeated = (
        torch.tensor([measure(each) for each in continuations], dtype=torch.float64)[:, None]
        for measure in (len, repeated_share)
    )
    return Continuations(length=mean(lengths), repeated=mean(repeated))


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of the sequences of SEQUENCE tokens that stand in `tokens` before; 0 for fewer tokens."""
    passages = [tuple(tokens[at : at + SEQUENCE]) for at in range(len(tokens) - SEQUENCE + 1)]
    return 1 - len(set(passages)) / len(passages) if passages else 0.0
