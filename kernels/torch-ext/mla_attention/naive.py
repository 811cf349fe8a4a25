"""Reference implementations of the kernels in plain PyTorch, in any precision and on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .rows import RowFormat, naive_pack, naive_unpack


def gather_pages(cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
    """Paged cache (pages, page_size, d) as (B, max_pages * page_size, d). Entries of the table past a length are not read."""
    page_size = cache.shape[1]
    used = torch.arange(block_table.shape[1], device=cache.device) * page_size < cache_seqlens[:, None]
    return cache[torch.where(used, block_table, 0).long()].flatten(1, 2)


def find_mask_bounds(mask: Tensor) -> Tensor:
    """Bounds of what the queries of each sequence see.

    Args:
        mask: (B, T, S), boolean, true where a query sees a token.

    Returns:
        (3, B) int32: the first token that any query sees, one past the last (both 0 where none is seen), and 1 where the
        mask has gaps. A mask has no gaps if between these bounds it is causal: the last of T queries sees up to the last
        token, the query before it one token less, and so on. The kernels read the mask itself only where it has gaps.
    """
    tokens, length = mask.shape[1:]
    position = torch.arange(length, device=mask.device)
    seen = mask.any(1)
    stop = torch.where(seen, position + 1, 0).amax(-1)
    start = torch.where(seen, position, length).amin(-1).minimum(stop)
    limit = stop[:, None] - torch.arange(tokens - 1, -1, -1, device=mask.device)
    causal = (position >= start[:, None, None]) & (position < limit[:, :, None])
    has_gaps = (mask != causal).flatten(1).any(-1)
    return torch.stack([start, stop, has_gaps.to(start.dtype)]).to(torch.int32)


def naive_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor | None,
    cache_seqlens: Tensor | None,
    *,
    softmax_scale: float,
    block_table: Tensor | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    mask: Tensor | None = None,
    row_format: RowFormat | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention of the absorbed queries on the latents (arXiv 2405.04434, section 2.1.2), written out.

    Arguments are those of `mla_decode`; `compute_dtype` is the dtype of all products and sums.

    Returns:
        Attended latents (B, T, H, r) and the natural logarithm of the sum of exponentials (B, H, T), in `compute_dtype`. A
        query that sees no token gets zeros, and minus infinity.
    """
    if mask is not None:
        cache_seqlens = find_mask_bounds(mask)[1]
    if block_table is not None:
        latent_cache = gather_pages(latent_cache, block_table, cache_seqlens)
        rope_cache = None if rope_cache is None else gather_pages(rope_cache, block_table, cache_seqlens)
    tokens = q_latent.shape[1]
    position = torch.arange(latent_cache.shape[1], device=latent_cache.device)
    outs, lses = [], []
    for b in range(q_latent.shape[0]):  # one sequence at a time: the scores of all sequences would not fit
        length = cache_seqlens[b]
        query_position = (length - tokens + torch.arange(tokens, device=position.device))[:, None]
        seen = position <= query_position
        if window is not None:
            seen = seen & (position > query_position - window)
        if mask is not None:
            seen = mask[b, :, : len(position)] & (position < length)
        # A token that no query sees may be NaN, and 0 * NaN is NaN.
        there = (seen.any(0) & (position < length))[:, None]
        if row_format is None:
            latent, rope = latent_cache[b].to(compute_dtype), rope_cache[b].to(compute_dtype)
        else:
            latent, rope = naive_unpack(latent_cache[b], q_latent.shape[3], q_rope.shape[3], row_format, compute_dtype)
        latent, rope = torch.where(there, latent, 0), torch.where(there, rope, 0)
        logits = torch.einsum("thr,sr->hts", q_latent[b].to(compute_dtype), latent)
        logits = (logits + torch.einsum("thp,sp->hts", q_rope[b].to(compute_dtype), rope)) * softmax_scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~seen, -torch.inf)
        weights = torch.softmax(logits, dim=-1).masked_fill(~seen.any(-1, keepdim=True), 0)
        outs.append(torch.einsum("hts,sr->thr", weights, latent))
        lses.append(torch.logsumexp(logits, dim=-1))
    return torch.stack(outs), torch.stack(lses)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on complex planes: x (..., 2m) holds m real then m imaginary parts, cos and sin (..., m)."""
    real, imag = x.chunk(2, dim=-1)
    return torch.cat([real * cos - imag * sin, imag * cos + real * sin], dim=-1)


def naive_write(
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
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Append latents and rotated keys to the caches, in place; return the rotated queries.

    Arguments are those of `mla_write`; keys and queries are rotated in `compute_dtype`.

    Returns:
        Rotated queries (B, T, H, query_room + p), the first `query_room` numbers zero.
    """
    cos, sin = cos.to(compute_dtype), sin.to(compute_dtype)
    key = rotate(k_rope.to(compute_dtype), cos, sin)
    query = rotate(q_rope.to(compute_dtype), cos[:, :, None], sin[:, :, None]).to(q_rope.dtype)
    if key_basis is not None:
        key, query = (
            (x.to(q_rope.dtype).to(compute_dtype) @ key_basis.to(compute_dtype)).to(q_rope.dtype) for x in (key, query)
        )
        latent, key = torch.cat([latent, key], -1), key[..., :0]
    query = pad(query, (query_room, 0)) if query_room else query
    kept = positions >= 0
    where = positions.clamp(min=0).long()
    if block_table is None:
        outer = torch.arange(positions.shape[0], device=positions.device)[:, None].expand_as(where)
        inner = where
    else:
        page_size = latent_cache.shape[1]
        outer = block_table.long().gather(1, where // page_size)
        inner = where % page_size
    if row_format is not None:
        latent_cache[outer[kept], inner[kept]] = naive_pack(latent[kept], key[kept].to(q_rope.dtype), row_format)
        return query
    latent_cache[outer[kept], inner[kept]] = latent[kept].to(latent_cache.dtype)
    rope_cache[outer[kept], inner[kept]] = key[kept].to(rope_cache.dtype)
    return query
