"""One launch in place of two for the few tokens of a small decode: absorbed queries, and rotated rows in the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens of a launch, the least rows of a matrix product of Triton; columns of the rank that a program computes.
TOKENS, RANK_BLOCK = 16, 128


@triton.jit
def _rotate(x_ptr, cos_ptr, sin_ptr, out_ptr, planes, PLANES: tl.constexpr):
    """Rotate one row of real parts, then imaginary ones."""
    plane = tl.arange(0, PLANES)
    there = plane < planes
    real = tl.load(x_ptr + plane, mask=there, other=0.0).to(tl.float32)
    imag = tl.load(x_ptr + planes + plane, mask=there, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + plane, mask=there, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + plane, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + plane, (real * cos - imag * sin).to(out_ptr.dtype.element_ty), mask=there)
    tl.store(out_ptr + planes + plane, (imag * cos + real * sin).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def absorb_and_write_kernel(
    q_ptr, map_ptr, latent_ptr, k_rope_ptr, cos_ptr, sin_ptr, cache_ptr, slots_ptr, q_latent_ptr, q_rope_ptr,
    tokens, heads, nope, rank, planes, stride_qt, stride_qh, stride_mh, stride_md, stride_lt, stride_kt, stride_ct,
    stride_st, width,
    TOKENS: tl.constexpr, NOPE: tl.constexpr, RANK: tl.constexpr, WHOLE: tl.constexpr, PLANES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs (head, part): parts of a head's absorbed queries, then its rotated query of each token; head 0 also writes."""
    head, part = tl.program_id(0), tl.program_id(1)
    parts = tl.cdiv(rank, RANK)
    if part < parts:
        # A name has one type in both branches, so these differ from those below.
        every, content, columns = tl.arange(0, TOKENS), tl.arange(0, NOPE), part * RANK + tl.arange(0, RANK)
        q_at = every[:, None].to(tl.int64) * stride_qt + head * stride_qh + content[None, :]
        q = tl.load(q_ptr + q_at, mask=(every < tokens)[:, None] & (content < nope)[None, :], other=0.0)
        map_at = head.to(tl.int64) * stride_mh + content[:, None] * stride_md + columns[None, :]
        up = tl.load(map_ptr + map_at, mask=(content < nope)[:, None] & (columns < rank)[None, :], other=0.0)
        found = tl.dot(q, up, input_precision=PRECISION).to(q_latent_ptr.dtype.element_ty)
        out_at = (every[:, None].to(tl.int64) * heads + head) * rank + columns[None, :]
        tl.store(q_latent_ptr + out_at, found, mask=(every < tokens)[:, None] & (columns < rank)[None, :])
    else:
        token = part - parts
        at = token.to(tl.int64)
        cos_row, sin_row = cos_ptr + at * stride_ct, sin_ptr + at * stride_st
        out_row = q_rope_ptr + (at * heads + head) * (2 * planes)
        _rotate(q_ptr + at * stride_qt + head * stride_qh + nope, cos_row, sin_row, out_row, planes, PLANES)
        if head == 0:
            slot = tl.load(slots_ptr + token).to(tl.int64)
            if slot >= 0:
                row_ptr, column = cache_ptr + slot * width, tl.arange(0, WHOLE)
                values = tl.load(latent_ptr + at * stride_lt + column, mask=column < rank, other=0.0)
                tl.store(row_ptr + column, values, mask=column < rank)
                _rotate(k_rope_ptr + at * stride_kt, cos_row, sin_row, row_ptr + rank, planes, PLANES)


def absorb_and_write(
    query: Tensor,
    up_key: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """Store new rows in a paged cache, with rotated keys; absorb and rotate their queries.

    Args:
        query: (T, H, nope + p), before RoPE; T at most TOKENS.
        up_key: (H, nope, r), the up-projection of the latent to keys; its last dimension contiguous.
        latent: (T, r).
        k_rope: (T, p), before RoPE.
        cos: (T, p / 2).
        sin: the same.
        cache: (pages, page size, r + p), contiguous.
        slots: (T,), row of each token; negative for none.

    Returns:
        Absorbed queries (T, H, r) and rotated queries (T, H, p), both contiguous.
    """
    tokens, heads, _ = query.shape
    nope, rank = up_key.shape[1:]
    rope_dim = k_rope.shape[-1]
    q_latent, q_rope = query.new_empty(tokens, heads, rank), query.new_empty(tokens, heads, rope_dim)
    absorb_and_write_kernel[(heads, triton.cdiv(rank, RANK_BLOCK) + tokens)](
        query, up_key, latent, k_rope, cos, sin, cache, slots, q_latent, q_rope,
        tokens, heads, nope, rank, rope_dim // 2, query.stride(0), query.stride(1), up_key.stride(0), up_key.stride(1),
        latent.stride(0), k_rope.stride(0), cos.stride(0), sin.stride(0), cache.shape[-1],
        # Triton's blocks are powers of two, and those of a product at least 16; masks cut them to size.
        TOKENS=TOKENS, NOPE=max(triton.next_power_of_2(nope), 16), RANK=RANK_BLOCK,
        WHOLE=triton.next_power_of_2(rank), PLANES=max(triton.next_power_of_2(rope_dim // 2), 1),
        # TF32 would round float32 queries to 10 bits.
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    return q_latent, q_rope
