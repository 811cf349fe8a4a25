"""Launch of the write kernel on tensors that `mla_write` has checked."""

from __future__ import annotations

from torch import Tensor

from .tuning import power_of_two

# Queries that a program rotates: at the usual rope dimensions, one 16-byte access for every thread of a warp.
_HEADS = 8


def write_triton(
    latent: Tensor,
    k_rope: Tensor,
    q_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    positions: Tensor,
    block_table: Tensor | None,
    query: Tensor,
) -> None:
    """Write one row per new token into both caches, in place, and the rotated queries into `query` (B, T, H, p)."""
    from .write_kernels import mla_write_fwd_kernel

    batch, tokens, heads, rope_dim = q_rope.shape
    rank = latent.shape[2]
    if batch == 0 or tokens == 0:
        return
    head_blocks = -(-heads // _HEADS) if rope_dim else 0
    mla_write_fwd_kernel[(batch * tokens, 1 + head_blocks)](
        latent, k_rope, q_rope, cos, sin, latent_cache, rope_cache, positions,
        positions if block_table is None else block_table, query,
        tokens, heads, rank, rope_dim // 2,
        *latent.stride()[:2], *k_rope.stride()[:2], *q_rope.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
        *latent_cache.stride()[:2], *rope_cache.stride()[:2], 0 if block_table is None else block_table.stride(0),
        *positions.stride(), *query.stride()[:3],
        RANK=power_of_two(rank), PLANES=power_of_two(max(rope_dim // 2, 1)), HEADS=_HEADS,
        PAGE=0 if block_table is None else latent_cache.shape[1], num_warps=2,
    )  # fmt: skip
