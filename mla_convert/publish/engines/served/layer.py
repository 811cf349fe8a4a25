"""A layer's attention on latents, without an engine: projections, decodes on latents, prefills on expanded keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_convert.modeling.latent_format_mla import LatentFormat, kernel_format, key_basis, layer_format
from mla_convert.modeling.quantised_latent_mla import dequantise_rows
from mla_convert.publish.engines.served import kernels
from mla_convert.publish.engines.served.prefill import PREFILL_TOKENS, Prefill
from mla_convert.publish.engines.served.rotary import LatentRotary

# Name of an engine's --kv-cache-dtype for which rows are quantised.
FP8 = ("fp8", "fp8_e4m3")


class Step(Protocol):
    """A step, as every layer reads it: no field depends on a layer's sizes.

    Attributes:
        num_decode_tokens: query tokens of the requests that decode; they come first.
        decode_query_len: query tokens of each of these requests.
        slot_mapping: (tokens,) int64, row of the cache that each token is written to; negative for none.
        block_table: (requests, pages) int32.
        seq_lens: (requests,) int32, tokens in the cache, those of this step included.
        prefill: the other requests.
    """

    num_decode_tokens: int
    decode_query_len: int
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    prefill: Prefill | None


@dataclass(frozen=True)
class Place:
    """An engine's part in a layer.

    Attributes:
        size: devices that heads are split over.
        rank: of this device among them.
        norm: class of the engine's RMS norm, which a stock attention has on queries and keys.
        output: makes the engine's output projection of (heads * v, hidden, whether it has a bias).
        cache_dtype: the engine's --kv-cache-dtype.
        flash: the engine's FlashAttention for heads of a width; None where it has none.
    """

    size: int
    rank: int
    norm: type[nn.Module]
    output: Callable[[int, int, bool], nn.Module]
    cache_dtype: str
    flash: Callable[[int], kernels.Flash | None]


def padded_rank(rank: int) -> int:
    """The rank that is cached: the next multiple of 16, for which there are kernels."""
    return -(-rank // 16) * 16


def padded_planes(rope_dim: int) -> int:
    """Rotary planes that are cached: the next multiple of 8."""
    return -(-rope_dim // 16) * 8


def cached_sizes(config: Any, index: int) -> tuple[int, int]:
    """Rank and rotary dims of a layer's rows: padded, unless both are channels of one latent, whose sum counts."""
    rows, rank, rope_dim = layer_format(config, index), config.layer_rank(index), config.layer_rope_dim(index)
    if rows is not None and rows.spreads:
        return rank, rope_dim
    return padded_rank(rank), 2 * padded_planes(rope_dim)


def row_format(config: Any, index: int, cache_dtype: str, heads: int) -> LatentFormat | None:
    """Format of a layer's quantised rows: the folder's own, or e4m3 with a scale a token for vLLM's "fp8"; None for numbers.

    Raises:
        ValueError: the kernels have no such row.
    """
    rows, sizes = layer_format(config, index), cached_sizes(config, index)
    if rows is None and cache_dtype in FP8:
        rows = LatentFormat("fp8", *sizes)
    if rows is None:
        return None
    seen = rows.joint  # as the decode kernels see it
    if (
        kernel_format(rows) is None
        or (rows.rank, rows.rope_dim) != sizes
        or not kernels.has_kernel(seen.rank, seen.rope_dim, heads)
    ):
        raise ValueError(
            f"converted model: layer {index} has {heads} heads and rows of {rows.rank} + {rows.rope_dim} numbers in {rows.kind} "
            f"and {rows.rope}, for which there is no kernel: serve it with transformers"
        )
    return rows


def _parameter(*shape: int) -> nn.Parameter:
    """A parameter of zeros: rows and columns that pad a size are never loaded."""
    return nn.Parameter(torch.zeros(*shape), requires_grad=False)


class LatentLayer(nn.Module):
    """Attention of a converted model (`MlaAttention` in attention_mla.py) on an engine's paged cache.

    Query and compressed projections are one matrix, so that a decode has one product before the kernels. Under tensor
    parallelism heads are split, and each device holds the whole latent.
    """

    key_basis: Tensor | None

    def __init__(
        self, config: Any, index: int, stock: nn.Module, softmax_scale: float, window: int | None, rotary: LatentRotary,
        place: Place,
    ) -> None:  # fmt: skip
        """Make a layer's attention.

        Args:
            config: the converted model's configuration.
            index: of the layer.
            stock: the engine's attention, whose norms stay.
            softmax_scale: multiplies the scores.
            window: tokens that a query sees; None for all.
            rotary: the tables of all layers.
            place: the engine's part.
        """
        super().__init__()
        self.index, self.latent_rotary, self.flash = index, rotary, place.flash
        # The name in messages; an engine may have its own.
        self.layer_name = f"{config.mla_layers}.{index}.{config.mla_attention}"
        self.softmax_scale, self.window, self.softcap = softmax_scale, window, config.mla_softcap or 0.0
        self.total_heads = config.num_attention_heads
        self.num_heads = self.total_heads // place.size
        self.first_head = place.rank * self.num_heads
        self.rank, self.rope_dim = config.layer_rank(index), config.layer_rope_dim(index)
        self.nope_dim, self.v_dim = config.layer_nope_dim(index), config.v_head_dim
        self.cached_rank, self.cached_rope = cached_sizes(config, index)
        self.head_size = self.cached_rank + self.cached_rope
        self.qk_dim = self.nope_dim + self.cached_rope
        self.normed = config.mla_q_norm is not None
        self.norm_over = config.mla_norm_over
        self._make_parameters(config, stock, place)
        self.rows = row_format(config, index, place.cache_dtype, self.num_heads)
        self.form = kernel_format(self.rows) if self.rows else None
        basis = key_basis(self.rows, self.fused) if self.rows else None
        self.register_buffer("key_basis", basis, persistent=False)

    def _make_parameters(self, config: Any, stock: nn.Module, place: Place) -> None:
        """Parameters of this device's heads, and the stock norms."""
        hidden, heads = config.hidden_size, self.num_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.total_heads
        self.query_width = heads * (self.v_dim if self.normed else self.qk_dim)
        self.rest_width = 2 * self.kv_heads * self.v_dim if self.normed else self.head_size
        self.fused = _parameter(self.query_width + self.rest_width, hidden)
        self.q_bias, self.kv_bias = config.mla_q_bias, config.mla_kv_bias
        biased = self.q_bias or self.kv_bias
        self.fused_bias = _parameter(self.query_width + self.rest_width) if biased else None
        if self.normed:
            self.query_map = _parameter(heads, self.qk_dim, self.v_dim)
            self.compress = _parameter(self.head_size, 2 * self.kv_heads * self.v_dim)
            self.norm_names = (config.mla_q_norm, config.mla_k_norm)
            self.q_norm = getattr(stock, config.mla_q_norm)
            self.k_norm = getattr(stock, config.mla_k_norm)
            if not (isinstance(self.q_norm, place.norm) and isinstance(self.k_norm, place.norm)):
                raise ValueError("converted model: the plugin has no norms on queries and keys but RMS norms of a head")
        # From a cached row to a head's key: up-projection of the latent, and the rotary key as it is. One product expands keys.
        self.key_map = _parameter(heads, self.qk_dim, self.head_size)
        self.key_map[:, self.nope_dim :, self.cached_rank :] = torch.eye(self.cached_rope)
        self.up_value = _parameter(heads, self.v_dim, self.cached_rank)
        self.o_proj = place.output(self.total_heads * self.v_dim, hidden, config.mla_o_bias)

    @property
    def shape(self) -> kernels.Shape:
        """The shape of this layer's decodes."""
        return kernels.Shape(
            self.nope_dim,
            self.cached_rank,
            self.cached_rope,
            self.num_heads,
            self.softmax_scale,
            self.softcap,
            self.window,
            self.form,
            self.key_basis is not None,
        )

    @property
    def up_key(self) -> Tensor:
        """The up-projection (heads, nope, r) of the latent to keys."""
        return self.key_map[:, : self.nope_dim, : self.cached_rank]

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (T, heads * (nope + p)) and the compressed part (T, r + p), before RoPE."""
        both = F.linear(hidden_states, self.fused, self.fused_bias)
        query, rest = both.split([self.query_width, self.rest_width], dim=-1)
        if not self.normed:
            return query, rest
        key, value = rest.chunk(2, dim=-1)
        query, key = self._norm(self.q_norm, query), self._norm(self.k_norm, key)
        heads = query.unflatten(-1, (self.num_heads, self.v_dim)).transpose(0, 1)
        mapped = torch.bmm(heads, self.query_map.transpose(1, 2)).transpose(0, 1).flatten(1)
        return mapped, F.linear(torch.cat([key, value], dim=-1), self.compress)

    def _norm(self, norm: nn.Module, rows: Tensor) -> Tensor:
        """A stock norm of rows (T, heads * d)."""
        if self.norm_over == "all":
            return norm(rows.contiguous())
        return norm(rows.unflatten(-1, (-1, self.v_dim)).contiguous()).flatten(1)

    def serve(
        self, query: Tensor, latent: Tensor, k_rope: Tensor, cache: Tensor, step: Step, output: Tensor
    ) -> Tensor:  # fmt: skip
        """Rotate, cache and attend.

        Args:
            query: (T, heads * (nope + p)), before RoPE.
            latent: (T, r).
            k_rope: (T, p), before RoPE.
            cache: (pages, page size, r + p).
            step: of these tokens, the first of which are its decodes.
            output: (T, heads * v), written.
        """
        tokens, done = len(query), step.num_decode_tokens
        query = query.view(tokens, self.num_heads, self.qk_dim)
        new = (latent, k_rope, *self.latent_rotary.of_layer(self.index, tokens))
        slots, out = step.slot_mapping[:tokens], output.view(tokens, self.num_heads, self.v_dim)
        if tokens == done and kernels.absorbs(tokens, self.shape, query.device):
            self._attend(*kernels.absorb_and_write(query, self.up_key, *new, cache, slots), cache, step, out)
            return output
        room = self.cached_rank if done and self.key_basis is not None else 0  # for absorbed queries
        q_rope = kernels.write(
            *new[:2], query[..., self.nope_dim :], *new[2:], cache, slots, self.form, self.key_basis, room
        )
        if done:
            self._attend(*self._absorb(query[:done], q_rope[:done]), cache, step, out[:done])
        if step.prefill:
            query[done:, :, self.nope_dim :] = q_rope[done:, :, room:]  # q is this operator's alone
            del q_rope  # its memory serves the expansion
            self._prefill(query[done:], cache, step.prefill, out[done:])
        return output

    def _absorb(self, query: Tensor, q_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (T, H, .) of the latents, and of the rotary keys where those are not among the latents' channels.

        One product per head over all tokens, written where the kernel reads it: in the room before rotated queries.
        """
        joint = self.key_basis is not None
        queries = q_rope if joint else query.new_empty(*query.shape[:2], self.cached_rank)
        absorbed = queries[..., : self.cached_rank]
        torch.bmm(query[..., : self.nope_dim].transpose(0, 1), self.up_key, out=absorbed.transpose(0, 1))
        return queries, q_rope[..., :0] if joint else q_rope

    def _attend(self, q_latent: Tensor, q_rope: Tensor, cache: Tensor, step: Step, out: Tensor) -> None:
        """Attend on latents, into out (T, H, v)."""
        tokens, heads, _ = out.shape
        each = step.decode_query_len
        requests = tokens // each
        attended = kernels.decode(
            q_latent.view(requests, each, heads, -1), q_rope.unflatten(0, (requests, each)), cache,
            step.seq_lens[:requests], step.block_table[:requests], self.softmax_scale, self.softcap, self.window, self.form,
        )  # fmt: skip
        attended = attended.view(tokens, heads, -1)[..., : self.cached_rank].transpose(0, 1)
        torch.bmm(attended, self.up_value.transpose(1, 2), out=out.transpose(0, 1))

    def _prefill(self, query: Tensor, cache: Tensor, prefill: Prefill, out: Tensor) -> None:
        """Expand keys and values of all cached tokens, also of earlier chunks, and attend, into out (T, H, v)."""
        rows = cache.view(-1, cache.shape[-1])
        half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        flash = self.flash(max(self.qk_dim, self.v_dim)) if half else None
        for group in prefill.groups:
            cached = rows[group.rows]
            if self.rows:
                cached = torch.cat(dequantise_rows(self.rows, cached, query.dtype), dim=-1)
            # So many heads at a time that a long sequence expands to no more than `_occupy` has allocated.
            count = min(max(PREFILL_TOKENS * self.num_heads // len(cached), 1), self.num_heads)
            for head in range(0, self.num_heads, count):
                chosen = slice(head, min(head + count, self.num_heads))
                key = F.linear(cached, self.key_map[chosen].flatten(0, 1)).unflatten(-1, (-1, self.qk_dim))
                values = self.up_value[chosen].flatten(0, 1)
                value = F.linear(cached[:, : self.cached_rank], values).unflatten(-1, (-1, self.v_dim))
                out[group.first : group.stop, chosen] = kernels.attend(
                    query[group.first : group.stop, chosen], key, value, group.query_starts, group.key_starts,
                    group.query_lens, group.key_lens, self.softmax_scale, self.softcap, self.window, flash,
                )  # fmt: skip
