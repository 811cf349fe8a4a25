"""Texts as tokens: what a tokenizer puts before them, which tokens are ordinary, and windows with some of them replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_convert.core.errors import InputError


def noised(windows: Tensor, share: float, tokenizer: Any, seed: int, vocabulary: int | None = None) -> Tensor:
    """Windows (N, L), in every second of which `share` of the tokens, but the first, are others of the vocabulary at random.

    A latent has room for what calibration looks at and for little else: on text of one kind it becomes a specialist. Tokens
    from all of the vocabulary, and contexts that no text has, keep it general. Special tokens are not drawn, nor those from
    `vocabulary` on.
    """
    drawn = ordinary_tokens(tokenizer, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    part = windows[1::2]
    hit = torch.rand(part.shape, generator=generator) < share
    hit[:, 0] = False  # the attention sink
    random = drawn[torch.randint(len(drawn), part.shape, generator=generator)]
    return windows.index_copy(0, torch.arange(1, len(windows), 2), torch.where(hit, random, part))


def ordinary_tokens(tokenizer: Any, vocabulary: int | None = None) -> Tensor:
    """The ids of all tokens that are not special, and that a model of so many rows has an embedding for.

    Raises:
        InputError: there is none.
    """
    special = set(tokenizer.all_special_ids)
    count = min(tokenizer.vocab_size, tokenizer.vocab_size if vocabulary is None else vocabulary)
    found = [token for token in range(count) if token not in special]
    if not found:
        raise InputError("the tokenizer has no tokens but special ones: it is damaged, or of another model")
    return torch.tensor(found)


def first_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text, if it does; those that it puts behind one are not among them."""
    bare, whole = (tokenise(tokenizer, "1", special) for special in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def tokenise(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Token ids of a text of any length."""
    # verbose=False: a warning about the model's maximum length means nothing for text that is cut into windows
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
