"""Launch of the write kernel on tensors that `mla_write` has checked."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import check_address
from .rows import RowFormat
from .tuning import power_of_two

# Queries that a program rotates: at the usual rope dimensions, one 16-byte access for every thread of a warp.
_HEADS = 8
# The same where they are multiplied by a matrix: the least rows of a product of Triton.
_PRODUCT_ROWS = 16


def write_triton(
    latent: Tensor,
    k_rope: Tensor,
    q_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor | None,
    positions: Tensor,
    block_table: Tensor | None,
    query: Tensor,
    row_format: RowFormat | None = None,
    key_basis: Tensor | None = None,
) -> None:
    """Write one row per new token into the caches, in place, and the rotated queries into `query` (B, T, H, p)."""
    from .write_kernels import mla_write_fwd_kernel

    batch, tokens, heads, rope_dim = q_rope.shape
    rank = latent.shape[2]
    if batch == 0 or tokens == 0:
        return
    if key_basis is not None:
        _write_joint(
            latent, k_rope, q_rope, cos, sin, latent_cache, positions, block_table, query, row_format, key_basis
        )
        return
    if row_format is not None:
        _write_packed(latent, k_rope, q_rope, cos, sin, latent_cache, positions, block_table, query, row_format)
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


def _write_packed(
    latent: Tensor, k_rope: Tensor, q_rope: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, positions: Tensor,
    block_table: Tensor | None, query: Tensor, form: RowFormat,
) -> None:  # fmt: skip
    """`write_triton` on packed rows (B, S, row_bytes) or (pages, page_size, row_bytes)."""
    from .write_kernels import mla_write_packed_kernel

    check_address(rows)
    batch, tokens, heads, rope_dim = q_rope.shape
    rank = latent.shape[2]
    at, narrow = form.layout(rank, rope_dim), rank - form.wide
    head_blocks = -(-heads // _HEADS) if rope_dim else 0
    mla_write_packed_kernel[(batch * tokens, 1 + head_blocks)](
        latent, k_rope, q_rope, cos, sin, rows, rows.view(torch.float16), rows.view(torch.bfloat16), positions,
        positions if block_table is None else block_table, query, tokens, heads, rope_dim // 2,
        *latent.stride()[:2], *k_rope.stride()[:2], *q_rope.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
        *rows.stride()[:2], 0 if block_table is None else block_table.stride(0), *positions.stride(),
        *query.stride()[:3], rank=rank, WIDE=form.wide, FLOAT8=bool(form.float8), GROUP=form.group,
        ROPE8=bool(form.rope_float8), CODES4=at.codes4, ROPE_AT=at.rope, SCALES=at.scales, GROUPS8=at.groups8,
        GROUPS=at.groups, GROUP8_P=power_of_two(form.group or form.wide), GROUPS8_P=power_of_two(at.groups8),
        GROUP4_P=power_of_two(form.group or narrow), GROUPS4_P=power_of_two(at.groups - at.groups8),
        BYTES=power_of_two(narrow // 2), PLANES=power_of_two(max(rope_dim // 2, 1)), HEADS=_HEADS,
        PAGE=0 if block_table is None else rows.shape[1], num_warps=2,
    )  # fmt: skip


def _write_joint(
    latent: Tensor, k_rope: Tensor, q_rope: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, positions: Tensor,
    block_table: Tensor | None, query: Tensor, form: RowFormat, basis: Tensor,
) -> None:  # fmt: skip
    """`write_triton` on packed rows whose last channels are the key times `basis` (p, p)."""
    from .write_kernels import mla_write_joint_kernel

    check_address(rows)
    batch, tokens, heads, rope_dim = q_rope.shape
    rank = latent.shape[2]
    at, narrow = form.layout(rank + rope_dim, 0), rank + rope_dim - form.wide
    mla_write_joint_kernel[(batch * tokens, 1 + -(-heads // _PRODUCT_ROWS))](
        latent, k_rope, q_rope, cos, sin, rows, rows.view(torch.float16), basis, positions,
        positions if block_table is None else block_table, query, tokens, heads, rope_dim // 2,
        *latent.stride()[:2], *k_rope.stride()[:2], *q_rope.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
        *rows.stride()[:2], 0 if block_table is None else block_table.stride(0), *positions.stride(),
        *query.stride()[:3], rank=rank, NARROW=narrow, WIDE=form.wide, GROUP=form.group, CODES4=at.codes4,
        SCALES=at.scales, GROUPS8=at.groups8, GROUPS=at.groups, GROUP8_P=power_of_two(form.group or form.wide),
        GROUPS8_P=power_of_two(at.groups8), GROUP4_P=power_of_two(form.group or narrow),
        GROUPS4_P=power_of_two(at.groups - at.groups8), BYTES=power_of_two(narrow // 2),
        PLANES=max(power_of_two(rope_dim // 2), 16), KEYS=max(power_of_two(rope_dim), 16), HEADS=_PRODUCT_ROWS,
        PAGE=0 if block_table is None else rows.shape[1],
        # TF32 would round float32 queries to 10 bits.
        PRECISION="ieee" if latent.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
