"""vLLM's FlashAttention for prefills, as `served.kernels.attend` calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor
from vllm.platforms import current_platform

from mla_convert.publish.engines.served.kernels import WIDEST_HEAD, Flash, common_width


@functools.cache
def flash_attention(head_dim: int) -> Flash | None:
    """vLLM's FlashAttention for heads of this width on this device; None where it has none."""
    if not current_platform.is_cuda() or head_dim > WIDEST_HEAD:
        return None
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    version = get_flash_attn_version(head_size=head_dim)
    return functools.partial(_attend, flash_attn_varlen_func, version) if version in (2, 3) else None


def _attend(
    call: Callable, version: int, query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor,
    most_queries: int, most_keys: int, scale: float, softcap: float, window: int | None,
) -> Tensor:  # fmt: skip
    v_dim = value.shape[-1]
    hopper = version == 3 and current_platform.is_device_capability_family(90)
    query, key, value = common_width(query, key, value, hopper)
    out = call(
        q=query, k=key, v=value, max_seqlen_q=most_queries, max_seqlen_k=most_keys, cu_seqlens_q=query_starts,
        cu_seqlens_k=key_starts, softmax_scale=scale, causal=True, softcap=softcap,
        # FlashAttention counts the tokens before a query, our window the query's own as well.
        window_size=None if window is None else [window - 1, 0], fa_version=version,
    )  # fmt: skip
    return out[..., :v_dim]
