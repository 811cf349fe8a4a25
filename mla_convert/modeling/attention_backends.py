"""Attention implementations for stock models, registered with transformers by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def sdpa_grouped_query(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **_,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of one query token on keys and values that several heads share.

    Heads that share keys are rows of one query, so that a key is read once for all of them. With a mask, transformers copies
    the keys for each head.

    Args:
        module: the stock attention; not used.
        query: (B, H, 1, d).
        key: (B, G, L, d).
        value: (B, G, L, v).
        attention_mask: (B, 1, 1, L), or None.
        scaling: multiplies the scores.
        softcap: must be None.
        s_aux: logits of attention sinks; must be None.

    Returns:
        The output (B, 1, H, v), and None for the weights.

    Raises:
        TypeError: there is a soft cap or a sink, which PyTorch's attention does not support.
    """
    if softcap is not None or s_aux is not None:
        raise TypeError("grouped attention has neither soft caps nor sinks: let the model attend eagerly")
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    attended = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(len(query), 1, query.shape[1], -1), None


# `sdpa_grouped_query`, with the mask that the model gets.
GROUPED = "mla_grouped"
# Causal attention on whole texts. Transformers builds no mask for an implementation without a registered mask function. For
# others it reads the positions on the host in every pass, and within a CUDA graph takes every text for several packed ones.
CAUSAL = "mla_causal"
AttentionInterface.register(GROUPED, sdpa_grouped_query)
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep PyTorch's attention from choosing cuDNN's, whose backward pass can give NaN on Hopper.

    Its kernels overflow where the scores of a whole row are below -88, as in the heads of Qwen2.5 with massive activations
    (pytorch/pytorch issue 196678, torch 2.11 to 2.13). FlashAttention, the memory-efficient kernel and plain operations do not.
    The switch is global, because gradient checkpointing repeats the forward pass within the backward pass.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def attention_backend(name: str, *models: nn.Module) -> Iterator[None]:
    """Switch models to the implementation `name` within the context, if all of them run on SDPA; else change nothing.

    Some stock models, such as Falcon, call no implementation by its name, and take every other than "sdpa" for eager attention.
    """
    configs = [model.config.get_text_config() for model in models]
    before = [config._attn_implementation for config in configs]
    try:
        by_name = all(getattr(model, "_supports_attention_backend", False) for model in models)
        for config in configs if by_name and set(before) == {"sdpa"} else ():
            config._attn_implementation = name
        yield
    finally:
        for config, each in zip(configs, before, strict=True):
            config._attn_implementation = each
