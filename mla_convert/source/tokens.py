"""Tokens of texts: a tokenizer's first tokens, its ordinary tokens, and windows with some tokens replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_convert.core.errors import InputError


def noised(windows: Tensor, share: float, tokenizer: Any, seed: int, vocabulary: int | None = None) -> Tensor:
    """Replace random tokens in every second window, except its first token.

    A latent keeps the directions that calibration contains and little else, so text of one kind makes it a specialist.
    Tokens from the whole vocabulary, in contexts that no text has, keep it general.

    Args:
        windows: (N, L).
        share: fraction of the tokens to replace.
        tokenizer: its special tokens are not drawn.
        seed: of the draw.
        vocabulary: rows of the model's embedding; tokens from there on are not drawn.

    Returns:
        (N, L).
    """
    drawn = ordinary_tokens(tokenizer, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    part = windows[1::2]
    hit = torch.rand(part.shape, generator=generator) < share
    hit[:, 0] = False  # the attention sink
    random = drawn[torch.randint(len(drawn), part.shape, generator=generator)]
    return windows.index_copy(0, torch.arange(1, len(windows), 2), torch.where(hit, random, part))


def ordinary_tokens(tokenizer: Any, vocabulary: int | None = None) -> Tensor:
    """The ids (n,) of all tokens that are not special and below `vocabulary`, the rows of the model's embedding.

    Raises:
        InputError: there is none.
    """
    special = set(tokenizer.all_special_ids)
    # Tokenizer and embedding may differ in size, and a token without a row cannot be embedded.
    count = min(tokenizer.vocab_size, tokenizer.vocab_size if vocabulary is None else vocabulary)
    ordinary = [token for token in range(count) if token not in special]
    if not ordinary:
        raise InputError("the tokenizer has no tokens but special ones: it is damaged, or of another model")
    return torch.tensor(ordinary)


def first_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer adds before a text (not those that it adds after one)."""
    bare, whole = (tokenise(tokenizer, "1", special) for special in (False, True))
    # Found by its tokens, because a count alone would not tell tokens before the text from those after it.
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def tokenise(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Token ids of a text of any length."""
    # verbose=False: the warning about the model's maximum length does not apply to text that is cut into windows
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
