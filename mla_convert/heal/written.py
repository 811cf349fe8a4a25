"""Text that the original writes itself: sampled from it, and so of every kind that it knows, whatever the text at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from mla_convert import texts
from mla_convert.progress import Progress

LENGTH = 512  # tokens of a document at most
SHORTEST = 16  # a document of fewer says nothing
BATCH = {"cuda": 256, "cpu": 16}
START = "<|endoftext|>"  # begins a document for most tokenizers that put nothing before a text


def start_token(tokenizer: Any) -> int:
    """What a document begins with: the token that the tokenizer puts before texts, or one that parts them."""
    prefix = texts.tokenise(tokenizer, "", special=True)[:1]
    if prefix:
        return prefix[0]
    known = tokenizer.convert_tokens_to_ids(START)
    found = [known if known != tokenizer.unk_token_id else None, tokenizer.bos_token_id, tokenizer.eos_token_id, 0]
    return next(token for token in found if token is not None)


@torch.no_grad()
def write(model: nn.Module, tokenizer: Any, tokens: int, seed: int, progress: Progress) -> list[list[int]]:
    """Documents of about `tokens` tokens in all, sampled at temperature 1 from the model, each from a document's beginning.

    Special tokens at which a document ends are left out, as is the first unless the tokenizer puts it before texts.
    """
    torch.manual_seed(seed)
    start, ends = start_token(tokenizer), set(tokenizer.all_special_ids)
    limit = getattr(model.config, "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, limit)
    batch = min(BATCH[model.device.type], -(-tokens // length))
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1, pad_token_id=tokenizer.pad_token_id or 0,
        eos_token_id=sorted(ends) or None,
    )  # fmt: skip
    prefix = texts.tokenise(tokenizer, "", special=True)[:1]
    found: list[list[int]] = []
    total, rounds = 0, -(-4 * tokens // (batch * length))  # a model that ends at once is not asked for ever
    progress.note(f"the original writes {tokens:,} tokens of its own")
    for _ in range(rounds):
        first = torch.full((batch, 1), start, device=model.device)
        for row in model.generate(first, attention_mask=torch.ones_like(first), generation_config=settings)[
            :, 1:
        ].tolist():
            stop = next((index for index, token in enumerate(row) if token in ends), len(row))
            if stop >= SHORTEST:
                found.append(prefix + row[:stop])
                total += len(found[-1])
        if total >= tokens:
            break
    return found
