"""Ways for a stock model to attend that transformers does not have, under names by which it finds them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def sdpa_grouped_query(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_
) -> tuple[Tensor, None]:
    """Attention of one query token (B, H, 1, d) on keys and values (B, G, L, .), with a mask (B, 1, 1, L) or on all: (B, 1, H, v).

    Heads that share keys are rows of one query, so that a key is read once for all, where transformers copies it for each
    if there is a mask.

    Raises:
        TypeError: a soft cap or sinks, which PyTorch's attention has not.
    """
    if softcap is not None or s_aux is not None:
        raise TypeError("grouped attention knows neither soft caps nor sinks: let the model attend eagerly")
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    attended = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(len(query), 1, query.shape[1], -1), None


# `sdpa_grouped_query`, with the mask that the model is given.
GROUPED = "mla_grouped"
# Causal attention on whole texts. Transformers makes no mask for an implementation that it knows no mask function of; else it
# would look at positions on the host, once a pass, and in a CUDA graph take every text for several.
CAUSAL = "mla_causal"
AttentionInterface.register(GROUPED, sdpa_grouped_query)
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


@contextlib.contextmanager
def attending(name: str, *models: nn.Module) -> Iterator[None]:
    """The models attend in the way of that name, if all of them run on `scaled_dot_product_attention`; else as they do."""
    configs = [model.config.get_text_config() for model in models]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs if set(before) == {"sdpa"} else ():
            config._attn_implementation = name
        yield
    finally:
        for config, each in zip(configs, before, strict=True):
            config._attn_implementation = each
