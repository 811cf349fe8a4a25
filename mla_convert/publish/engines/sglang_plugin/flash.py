"""SGLang's FlashAttention 3 for prefills, as `served.kernels.attend` calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mla_convert.publish.engines.served.kernels import WIDEST_HEAD, Flash, common_width


@functools.cache
def flash_attention(head_dim: int) -> Flash | None:
    """FlashAttention 3 for heads of this width, on a Hopper card with the operators in sglang-kernel; None elsewhere."""
    if head_dim > WIDEST_HEAD or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from sgl_kernel.flash_attn import flash_attn_varlen_func, is_fa3_supported
    except ImportError:  # a build without these operators
        return None
    return functools.partial(_attend, flash_attn_varlen_func) if is_fa3_supported() else None


def _attend(
    call: Callable, query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor,
    most_queries: int, most_keys: int, scale: float, softcap: float, window: int | None,
) -> Tensor:  # fmt: skip
    v_dim = value.shape[-1]
    query, key, value = common_width(query, key, value, hopper=True)
    out = call(
        query, key, value, query_starts, key_starts, most_queries, most_keys, softmax_scale=scale, causal=True,
        # FlashAttention counts the tokens before a query, our window the query's own as well.
        softcap=softcap, window_size=(-1, -1) if window is None else (window - 1, 0),
    )  # fmt: skip
    return out[..., :v_dim]
