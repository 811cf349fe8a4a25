"""Decode attention for Multi-head Latent Attention at any rank, over contiguous and paged latent caches."""

import torch
from torch import Tensor

from . import ops
from .naive import find_mask_bounds, naive_decode, naive_write
from .problem import (
    MAX_RANK,
    DecodeProblem,
    check_block_table,
    check_cache,
    check_key_basis,
    check_options,
    check_queries,
    check_rows,
    check_shape,
    check_widths,
    expect,
)
from .rows import RowFormat

__all__ = [
    "MAX_RANK",
    "RowFormat",
    "find_mask_bounds",
    "mask_extent",
    "mla_decode",
    "mla_write",
    "naive_decode",
    "naive_write",
]

# Its former name, under which the code beside earlier converted models calls it.
mask_extent = find_mask_bounds


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor | None,
    cache_seqlens: Tensor | None,
    *,
    softmax_scale: float,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    softcap: float = 0.0,
    window: int | None = None,
    mask: Tensor | None = None,
    mask_bounds: Tensor | None = None,
    extent: Tensor | None = None,
    row_format: RowFormat | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of absorbed queries on a latent cache that all heads share (arXiv 2405.04434, section 2.1.2).

    The latents serve as keys and as values; the rotary keys only add to the scores. Split over the sequence as in
    Flash-Decoding (Dao et al., 2023), with online softmax (arXiv 1805.02867).

    Args:
        q_latent: (B, T, H, r), queries carried through the key up-projection. T query tokens per sequence, the last T of
            its `cache_seqlens` tokens; their own rows are already in the cache. r a multiple of 16, 16 to 1024; H 1 to 128.
        q_rope: (B, T, H, p), rotated queries. p a multiple of 16, 0 to 128.
        latent_cache: (B, S, r), or (pages, page_size, r) with a block table. Any strides, but the last dimension contiguous.
            Rows past a sequence's length may hold anything, NaN included. With `row_format`, packed rows of `row_bytes` uint8
            in place of r numbers, on addresses that are multiples of 16.
        rope_cache: (B, S, p), or (pages, page_size, p); None with `row_format`.
        cache_seqlens: (B,) int32, tokens in the cache of each sequence, 0 upwards, contiguous. Not read on the host.
        softmax_scale: multiplies the scores, > 0.
        block_table: (B, max_pages) int32, page of every page_size tokens; entries past a length are not read.
        num_splits: parts into which every sequence is cut, 1 to 1024; None lets the launcher choose, which may instead
            distribute all tiles evenly over the multiprocessors.
        out: (B, T, H, r), written to and returned if given.
        return_lse: also return the natural logarithm of the sum of exponentials, (B, H, T) float32.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        window: a query sees its own token and the window - 1 before it; None, all.
        mask: (B, T, S), boolean, true where a query sees a token; rows contiguous, B may be expanded. In place of
            `cache_seqlens`, which is then None, and of causality: left padding, a static cache's unwritten part, trees of
            drafts. Tokens outside `mask_bounds` are not read.
        mask_bounds: (3, B) int32, `find_mask_bounds(mask)`; layers that share a mask need it once. Computed if None.
        extent: the former name of `mask_bounds`, which the code beside earlier converted models uses.
        row_format: what the packed rows of a quantised cache hold; None for a cache of numbers.

    Returns:
        Attended latents (B, T, H, r) in the queries' dtype, with the lse if asked for. A query that sees no token gets
        zeros, and minus infinity.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    check_options(softmax_scale, num_splits, softcap, window)
    check_queries(q_latent, q_rope)
    batch, tokens, heads, _ = q_latent.shape
    if mask is not None:
        check_shape("mask", mask, batch, tokens, None)
        mask_bounds = extent if mask_bounds is None else mask_bounds
        mask_bounds = find_mask_bounds(mask) if mask_bounds is None else mask_bounds
    if out is None:
        out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q_latent.device)
    problem = DecodeProblem(
        q_latent, q_rope, latent_cache, rope_cache, cache_seqlens, block_table, softmax_scale, num_splits or 0, softcap,
        window or 0, mask, mask_bounds, out, lse, row_format,
    )  # fmt: skip
    problem.check()
    ops.decode(*problem)
    return (out, lse) if return_lse else out


def mla_write(
    latent: Tensor,
    k_rope: Tensor,
    q_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor | None,
    positions: Tensor,
    *,
    block_table: Tensor | None = None,
    row_format: RowFormat | None = None,
    key_basis: Tensor | None = None,
    query_room: int = 0,
) -> Tensor:
    """Append T new tokens per sequence to the caches, in place, with rotated keys; return the rotated queries.

    RoPE (arXiv 2104.09864) acts on complex planes: a row of p numbers holds p / 2 real parts, then p / 2 imaginary ones.

    Args:
        latent: (B, T, r), stored as they are, or quantised where there is a format.
        k_rope: (B, T, p), keys before RoPE.
        q_rope: (B, T, H, p), queries before RoPE.
        cos: (B, T, p / 2), cosines of the tokens' angles, one per plane; float32 or the queries' dtype; B may be expanded.
        sin: (B, T, p / 2), their sines, in the dtype of `cos`.
        latent_cache: as in `mla_decode`.
        rope_cache: as in `mla_decode`.
        positions: (B, T), int32 or int64, index of the token in its sequence; a token of negative position is not stored.
        block_table: as in `mla_decode`.
        row_format: as in `mla_decode`. The rotated key is rounded to its dtype before it is quantised.
        key_basis: (p, p), contiguous, in the queries' dtype: rows are those of a latent of r + p channels without a rotary key,
            of which the last p, with 4 bits, are the rotated key times this matrix. Rotated queries are multiplied by it, too.
            `mla_decode` then has queries of r + p numbers. r + p is a multiple of 16, p even, 2 to 128.
        query_room: numbers before each rotated query that are left to the caller: r of them for the absorbed query make the two
            one query of `mla_decode`.

    Returns:
        Rotated queries (B, T, H, query_room + p), contiguous.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.
    """
    expect(latent.dim() == 3, lambda: f"latent has {latent.dim()} dimensions, expected (B, T, r)")
    expect(q_rope.dim() == 4, lambda: f"q_rope has {q_rope.dim()} dimensions, expected (B, T, H, p)")
    batch, tokens, rank = latent.shape
    heads, rope_dim = q_rope.shape[2:]
    if key_basis is None:
        check_widths(rank, rope_dim, heads)
    else:
        check_key_basis(key_basis, row_format, latent, rope_dim, heads)
    check_shape("k_rope", k_rope, batch, tokens, rope_dim)
    check_shape("q_rope", q_rope, batch, tokens, heads, rope_dim)
    check_shape("cos", cos, batch, tokens, rope_dim // 2)
    check_shape("sin", sin, batch, tokens, rope_dim // 2)
    check_shape("positions", positions, batch, tokens)
    check_cache(
        latent_cache,
        rope_cache,
        row_format,
        rank if key_basis is None else rank + rope_dim,
        rope_dim if key_basis is None else 0,
        batch if block_table is None else None,
        latent.dtype,
        latent.device,
    )
    check_rows(latent.dtype, latent.device, latent=latent, k_rope=k_rope, q_rope=q_rope)
    check_rows(cos.dtype, latent.device, cos=cos, sin=sin)
    expect(
        positions.dtype in (torch.int32, torch.int64),
        lambda: f"positions has dtype {positions.dtype}, expected int32 or int64",
    )
    if block_table is not None:
        check_block_table(block_table, latent.device, batch)
    return ops.write(
        latent,
        k_rope,
        q_rope,
        cos,
        sin,
        latent_cache,
        rope_cache,
        positions,
        block_table,
        row_format,
        key_basis,
        query_room,
    )
