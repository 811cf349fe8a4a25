"""Attention on paged latents: the kernels of mla_attention for decodes, an engine's FlashAttention or PyTorch for prefills."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mla_attention
from mla_attention.problem import MAX_HEADS, MAX_RANK, MAX_ROPE

# (queries, keys, values, first queries, first keys, most queries, most keys, scale, softcap, window) -> outputs
Flash = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, float, int | None], Tensor]
# Widest heads of FlashAttention; sizes of queries and values for which Hopper's takes values narrower than keys.
WIDEST_HEAD = 256
# Most tokens of a decode, and widest content of a head, for which one launch absorbs, rotates and writes.
MOST_ABSORBED, MOST_ABSORBED_NOPE = 16, 128
NATIVE_VALUES = ((128, 192, 96, 128), (0, 64, 0, 512))


class Shape(NamedTuple):
    """Sizes and options that the decode kernels are compiled for.

    `joint`: rows of the `form` have their rotary key as channels of the latent.
    """

    nope_dim: int
    rank: int
    rope_dim: int
    heads: int
    scale: float
    softcap: float
    window: int | None
    form: tuple[int, ...] | None = None
    joint: bool = False

    @property
    def decoded(self) -> tuple[int, int]:
        """Rank and rotary dims of the rows as the decode kernels see them."""
        return (self.rank + self.rope_dim, 0) if self.joint else (self.rank, self.rope_dim)

    @property
    def row(self) -> int:
        """Elements of a cached row: numbers, or bytes of a quantised one."""
        if self.form is None:
            return self.rank + self.rope_dim
        return mla_attention.RowFormat(*self.form).layout(*self.decoded).row_bytes


def has_kernel(rank: int, rope_dim: int, heads: int) -> bool:
    """Whether mla_attention serves these sizes; without it, decodes are right and slow."""
    return (
        rank % 16 == 0 and 16 <= rank <= MAX_RANK and rope_dim % 16 == 0 and rope_dim <= MAX_ROPE and heads <= MAX_HEADS
    )


def absorbs(tokens: int, shape: Shape, device: torch.device) -> bool:
    """Whether `absorb_and_write` serves decodes of `tokens` tokens in all."""
    few = shape.form is None and tokens <= MOST_ABSORBED and shape.nope_dim <= MOST_ABSORBED_NOPE
    return few and device.type == "cuda" and has_kernel(shape.rank, shape.rope_dim, shape.heads)


def absorb_and_write(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of that name, with its arguments."""
    from mla_convert.publish.engines.served.absorb_kernels import absorb_and_write

    return absorb_and_write(*arguments)


def write(
    latent: Tensor, k_rope: Tensor, q_rope: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor,
    form: tuple[int, ...] | None = None, basis: Tensor | None = None,
    room: int = 0,
) -> Tensor:  # fmt: skip
    """Store new rows in a paged cache, with rotated keys; return the rotated queries (T, H, room + p).

    Args:
        latent: (T, r).
        k_rope: (T, p), before RoPE.
        q_rope: (T, H, p), before RoPE.
        cos: (T, p / 2), float32.
        sin: the same.
        cache: (pages, page size, row), contiguous: r + p numbers, or the bytes of `form`.
        slots: (T,), row of each token; negative for none.
        form: the numbers of a `RowFormat` where rows are quantised.
        basis: (p, p), matrix that rotated keys and queries are multiplied by, where the keys are channels of the latent.
        room: numbers before each rotated query that the caller sets; packed rows alone.
    """
    rank, heads = latent.shape[-1], q_rope.shape[1]
    rows = cache.view(1, -1, cache.shape[-1])
    if form is not None:
        tables = (cos[None], sin[None], rows, None, slots[None])
        options = {"row_format": mla_attention.RowFormat(*form), "key_basis": basis, "query_room": room}
        return mla_attention.mla_write(latent[None], k_rope[None], q_rope[None], *tables, **options)[0]
    call = mla_attention.mla_write if has_kernel(rank, k_rope.shape[-1], heads) else mla_attention.naive_write
    return call(
        latent[None], k_rope[None], q_rope[None], cos[None], sin[None], rows[..., :rank], rows[..., rank:], slots[None]
    )[0]


def decode(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, seq_lens: Tensor, block_table: Tensor, scale: float,
    softcap: float, window: int | None, form: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """Attended latents (B, T, H, r) of absorbed queries (B, T, H, r) and rotated queries (B, T, H, p)."""
    rank, rope_dim = q_latent.shape[-1], q_rope.shape[-1]
    options = {"softmax_scale": scale, "block_table": block_table, "softcap": softcap, "window": window}
    if form is not None:
        form = mla_attention.RowFormat(*form)
        return mla_attention.mla_decode(q_latent, q_rope, cache, None, seq_lens, row_format=form, **options)
    latents, keys = cache[..., :rank], cache[..., rank:]
    if has_kernel(rank, rope_dim, q_latent.shape[2]):
        return mla_attention.mla_decode(q_latent, q_rope, latents, keys, seq_lens, **options)
    attended, _ = mla_attention.naive_decode(
        q_latent, q_rope, latents, keys, seq_lens, compute_dtype=torch.float32, **options
    )
    return attended.to(q_latent.dtype)


@functools.cache
def compile_decodes(shapes: frozenset[Shape], block_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile the kernels of all layers' shapes side by side, before CUDA graphs need one after another."""
    known = [s for s in shapes if device.type == "cuda" and has_kernel(*s.decoded, s.heads)]
    if not known:
        return

    def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(*size, dtype=dtype, device=device)

    def attend_once(s: Shape) -> None:
        with torch.inference_mode(), torch.cuda.device(device):
            q_latent, q_rope = (zeros(1, 1, s.heads, size) for size in s.decoded)
            table = zeros(1, 1, dtype=torch.int32)
            cache = zeros(1, block_size, s.row, dtype=dtype if s.form is None else torch.uint8)
            decode(q_latent, q_rope, cache, table[0] + 1, table, s.scale, s.softcap, s.window, s.form)

    with ThreadPoolExecutor(min(len(known), 16)) as pool:
        list(pool.map(attend_once, known))
    for s in known:
        for tokens in (1, 2, MOST_ABSORBED):  # Triton compiles for one, for any, and for multiples of 16
            if absorbs(tokens, s, device):
                tables = zeros(2, tokens, s.rope_dim // 2, dtype=torch.float32)
                absorb_and_write(
                    zeros(tokens, s.heads, s.nope_dim + s.rope_dim), zeros(s.heads, s.nope_dim, s.rank),
                    zeros(tokens, s.rank), zeros(tokens, s.rope_dim), *tables, zeros(1, block_size, s.rank + s.rope_dim),
                    zeros(tokens, dtype=torch.int64) - 1,
                )  # fmt: skip


def attend(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, query_lens: list[int],
    key_lens: list[int], scale: float, softcap: float, window: int | None, flash: Flash | None = None,
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
        flash: the engine's FlashAttention, which takes all of these but the lists of lengths, for which it has the
            largest ones; None where it has none for these heads.

    Returns:
        (T, H, v).
    """
    if flash is None:
        return _attend_plain(query, key, value, query_lens, key_lens, scale, softcap, window)
    lengths = max(query_lens), max(key_lens)
    return flash(query, key, value, query_starts, key_starts, *lengths, scale, softcap, window)


def common_width(query: Tensor, key: Tensor, value: Tensor, hopper: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same attention in heads that FlashAttention takes: of one width, a multiple of 8, unless it takes two.

    `hopper`: it is FlashAttention 3 on a Hopper card, which takes some values narrower than keys.
    """
    qk_dim, v_dim = query.shape[-1], value.shape[-1]
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
        # `is_causal` aligns queries with the first keys, which is right only where there are as many.
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
