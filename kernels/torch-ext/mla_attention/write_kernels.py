"""Triton kernel of `mla_write`: RoPE of new keys and queries, and the append to the caches, in one launch."""

import triton
import triton.language as tl


@triton.jit
def mla_write_fwd_kernel(
    latent, k_rope, q_rope, cos, sin, latent_cache, rope_cache, positions, block_table, query,
    tokens, heads, rank, planes,
    stride_lb, stride_lt, stride_kb, stride_kt, stride_qb, stride_qt, stride_qh, stride_ab, stride_at, stride_zb,
    stride_zt, stride_cb, stride_cn, stride_rb, stride_rn, stride_tb, stride_pb, stride_pt, stride_yb, stride_yt,
    stride_yh,
    RANK: tl.constexpr, PLANES: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * tokens, 1 + head blocks): program (., 0) writes the caches, every other one rotates HEADS queries."""
    b = (tl.program_id(0) // tokens).to(tl.int64)
    t = tl.program_id(0) % tokens
    block = tl.program_id(1)
    m = tl.arange(0, PLANES)
    in_planes = m < planes
    c = tl.load(cos + b * stride_ab + t * stride_at + m, mask=in_planes, other=0.0).to(tl.float32)
    s = tl.load(sin + b * stride_zb + t * stride_zt + m, mask=in_planes, other=0.0).to(tl.float32)
    if block == 0:
        position = tl.load(positions + b * stride_pb + t * stride_pt)
        if position >= 0:
            if PAGE == 0:
                outer = b
                inner = position.to(tl.int64)
            else:
                outer = tl.load(block_table + b * stride_tb + position // PAGE).to(tl.int64)
                inner = (position % PAGE).to(tl.int64)
            r = tl.arange(0, RANK)
            row = tl.load(latent + b * stride_lb + t * stride_lt + r, mask=r < rank, other=0.0)
            tl.store(
                latent_cache + outer * stride_cb + inner * stride_cn + r,
                row.to(latent_cache.dtype.element_ty),
                mask=r < rank,
            )
            x = k_rope + b * stride_kb + t * stride_kt + m
            real = tl.load(x, mask=in_planes, other=0.0).to(tl.float32)
            imag = tl.load(x + planes, mask=in_planes, other=0.0).to(tl.float32)
            y = rope_cache + outer * stride_rb + inner * stride_rn + m
            tl.store(y, (real * c - imag * s).to(rope_cache.dtype.element_ty), mask=in_planes)
            tl.store(y + planes, (imag * c + real * s).to(rope_cache.dtype.element_ty), mask=in_planes)
    else:
        h = (block - 1) * HEADS + tl.arange(0, HEADS)
        in_range = (h < heads)[:, None] & in_planes[None, :]
        x = q_rope + b * stride_qb + t * stride_qt + h[:, None] * stride_qh + m[None, :]
        real = tl.load(x, mask=in_range, other=0.0).to(tl.float32)
        imag = tl.load(x + planes, mask=in_range, other=0.0).to(tl.float32)
        y = query + b * stride_yb + t * stride_yt + h[:, None] * stride_yh + m[None, :]
        tl.store(y, (real * c[None, :] - imag * s[None, :]).to(query.dtype.element_ty), mask=in_range)
        tl.store(y + planes, (imag * c[None, :] + real * s[None, :]).to(query.dtype.element_ty), mask=in_range)
