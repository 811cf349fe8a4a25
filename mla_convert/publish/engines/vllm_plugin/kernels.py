"""Attention on paged latents: the kernels of mla_attention for decodes, vLLM's FlashAttention or PyTorch for prefills."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mla_attention
from mla_attention.problem import MAX_HEADS, MAX_RANK, MAX_ROPE

# Widest heads of FlashAttention; sizes of queries and values for which Hopper's takes values narrower than keys.
WIDEST_HEAD = 256
NATIVE_VALUES = ((128, 192, 96, 128), (0, 64, 0, 512))


def has_kernel(rank: int, rope_dim: int, heads: int) -> bool:
    """Whether mla_attention serves these sizes; without it, decodes are right and slow."""
    return (
        rank % 16 == 0 and 16 <= rank <= MAX_RANK and rope_dim % 16 == 0 and rope_dim <= MAX_ROPE and heads <= MAX_HEADS
    )


def write(
    latent: Tensor, k_rope: Tensor, q_rope: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor
) -> Tensor:
    """Store new rows in a paged cache, with rotated keys; return the rotated queries (T, H, p).

    Args:
        latent: (T, r).
        k_rope: (T, p), before RoPE.
        q_rope: (T, H, p), before RoPE.
        cos: (T, p / 2), float32.
        sin: the same.
        cache: (pages, page size, r + p), contiguous.
        slots: (T,), row of each token; negative for none.
    """
    rank, heads = latent.shape[-1], q_rope.shape[1]
    rows = cache.view(1, -1, cache.shape[-1])
    call = mla_attention.mla_write if has_kernel(rank, k_rope.shape[-1], heads) else mla_attention.naive_write
    return call(
        latent[None], k_rope[None], q_rope[None], cos[None], sin[None], rows[..., :rank], rows[..., rank:], slots[None]
    )[0]


def decode(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, seq_lens: Tensor, block_table: Tensor, scale: float,
    softcap: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Attended latents (B, T, H, r) of absorbed queries (B, T, H, r) and rotated queries (B, T, H, p)."""
    rank, rope_dim = q_latent.shape[-1], q_rope.shape[-1]
    latents, keys = cache[..., :rank], cache[..., rank:]
    options = {"softmax_scale": scale, "block_table": block_table, "softcap": softcap, "window": window}
    if has_kernel(rank, rope_dim, q_latent.shape[2]):
        return mla_attention.mla_decode(q_latent, q_rope, latents, keys, seq_lens, **options)
    attended, _ = mla_attention.naive_decode(
        q_latent, q_rope, latents, keys, seq_lens, compute_dtype=torch.float32, **options
    )
    return attended.to(q_latent.dtype)


class Shape(NamedTuple):
    """What the decode kernels are compiled for."""

    rank: int
    rope_dim: int
    heads: int
    scale: float
    softcap: float
    window: int | None


@functools.cache
def compile_decodes(shapes: frozenset[Shape], block_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile the kernels of all layers' shapes side by side, before a CUDA graph needs one after another."""
    known = [s for s in shapes if device.type == "cuda" and has_kernel(s.rank, s.rope_dim, s.heads)]

    def once(shape: Shape) -> None:
        rank, rope_dim, heads, scale, softcap, window = shape
        with torch.inference_mode(), torch.cuda.device(device):
            like: dict[str, Any] = {"dtype": dtype, "device": device}
            cache = torch.zeros(1, block_size, rank + rope_dim, **like)
            lens, table = (
                torch.ones(1, dtype=torch.int32, device=device),
                torch.zeros(1, 1, dtype=torch.int32, device=device),
            )
            decode(torch.zeros(1, 1, heads, rank, **like), torch.zeros(1, 1, heads, rope_dim, **like), cache, lens, table,
                   scale, softcap, window)  # fmt: skip

    if known:
        with ThreadPoolExecutor(min(len(known), 16)) as pool:
            list(pool.map(once, known))


@functools.cache
def flash_version(head_dim: int) -> int | None:
    """Version of vLLM's FlashAttention for heads of this width on this device; None where it has none."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda() or head_dim > WIDEST_HEAD:
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=head_dim)
    return version if version in (2, 3) else None


def attend(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, query_lens: list[int],
    key_lens: list[int], scale: float, softcap: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Causal attention of several requests; each one's queries are the last of its tokens.

    Args:
        query: (T, H, qk), request after request.
        key: (S, H, qk).
        value: (S, H, v).
        query_starts: (requests + 1,) int32, first query of each request, and the number of all.
        key_starts: the same for keys.
        query_lens: queries of each request.
        key_lens: keys of each request.
        scale: multiplies the scores.
        softcap: bound of the scores; 0 for none.
        window: tokens that a query sees, its own included; None for all.

    Returns:
        (T, H, v).
    """
    flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    version = flash_version(max(query.shape[-1], value.shape[-1])) if flash else None
    if version is None:
        return _attend_plain(query, key, value, query_lens, key_lens, scale, softcap, window)
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    v_dim = value.shape[-1]
    query, key, value = _common_width(query, key, value, version)
    out = flash_attn_varlen_func(
        q=query, k=key, v=value, max_seqlen_q=max(query_lens), max_seqlen_k=max(key_lens), cu_seqlens_q=query_starts,
        cu_seqlens_k=key_starts, softmax_scale=scale, causal=True, softcap=softcap,
        window_size=None if window is None else [window - 1, 0], fa_version=version,
    )  # fmt: skip
    return out[..., :v_dim]


def _common_width(query: Tensor, key: Tensor, value: Tensor, version: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same attention in heads that FlashAttention takes: of one width, a multiple of 8, unless it takes two."""
    from vllm.platforms import current_platform

    qk_dim, v_dim = query.shape[-1], value.shape[-1]
    hopper = version == 3 and current_platform.is_device_capability_family(90)
    if qk_dim % 8 == v_dim % 8 == 0 and hopper:
        for above, most, v_above, v_most in NATIVE_VALUES:
            if above < qk_dim <= most and v_above < v_dim <= v_most:
                return query, key, value
    width = -(-max(qk_dim, v_dim) // 8) * 8
    if qk_dim < width:
        query, key = F.pad(query, (0, width - qk_dim)), F.pad(key, (0, width - qk_dim))
    return query, key, F.pad(value, (0, width - v_dim)) if v_dim < width else value


def _attend_plain(
    query: Tensor, key: Tensor, value: Tensor, query_lens: list[int], key_lens: list[int], scale: float,
    softcap: float, window: int | None,
) -> Tensor:  # fmt: skip
    """`attend` in PyTorch, one request after another."""
    parts = []
    queries, keys, values = query.split(query_lens), key.split(key_lens), value.split(key_lens)
    for q, k, v in zip(queries, keys, values, strict=True):
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if softcap == 0 and window is None and q.shape[1] == k.shape[1]:
            parts.append(F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0])
            continue
        own = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
        position = torch.arange(k.shape[1], device=q.device)
        seen = position <= own
        if window is not None:
            seen &= position > own - window
        if softcap == 0:
            parts.append(F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, scale=scale)[0])
            continue
        scores = softcap * torch.tanh((q @ k.transpose(1, 2)).float() * scale / softcap)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype)
        parts.append(weights @ v)
    return torch.cat([part.transpose(0, 1) for part in parts])
