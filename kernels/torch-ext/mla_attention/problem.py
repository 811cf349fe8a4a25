"""The arguments of one decode call as one object, and the checks that name a wrong argument.

`mla_decode` builds a `DecodeProblem` and checks it once; the operator and the launchers take it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import ALIGN, RowFormat, RowLayout

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANK, MAX_ROPE, MAX_HEADS, MAX_SPLITS = 1024, 128, 128, 1024


class DecodeProblem(NamedTuple):
    """Everything that a decode kernel is given, in the order of the operator's arguments; shapes as in `mla_decode`.

    A tuple, because an operator takes tensors and numbers alone: `ops.decode(*problem)`. Sizes are read from the tensors.

    Attributes:
        num_splits: parts of a sequence; 0 lets the launcher choose.
        window: tokens that a query sees; 0 for all.
        mask_bounds: (3, B) int32, `find_mask_bounds(mask)`; None without a mask.
        out: (B, T, H, r), written.
        lse: (B, H, T) float32, written.
        row_format: of packed rows, which `latent_cache` then holds, (B, S, row_bytes) or (pages, page_size, row_bytes) uint8;
            `rope_cache` is None. None for a cache of numbers.
    """

    q_latent: Tensor
    q_rope: Tensor
    latent_cache: Tensor
    rope_cache: Tensor | None
    cache_seqlens: Tensor | None
    block_table: Tensor | None
    softmax_scale: float
    num_splits: int
    softcap: float
    window: int
    mask: Tensor | None
    mask_bounds: Tensor | None
    out: Tensor
    lse: Tensor
    row_format: RowFormat | None = None

    @property
    def layout(self) -> RowLayout:
        """Sections of a packed row."""
        return self.row_format.layout(self.rank, self.rope_dim)

    @property
    def rank(self) -> int:
        """Numbers of a latent, r."""
        return self.q_latent.shape[3]

    @property
    def rope_dim(self) -> int:
        """Numbers of a rotary key, p."""
        return self.q_rope.shape[3]

    @property
    def rows(self) -> int:
        """Query rows of a sequence: heads times query tokens."""
        return self.q_latent.shape[1] * self.q_latent.shape[2]

    @property
    def page_size(self) -> int:
        """Tokens in a page; 0 for a contiguous cache."""
        return 0 if self.block_table is None else self.latent_cache.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that the cache has room for in each sequence."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return self.latent_cache.shape[1] * pages

    def check(self) -> None:
        """Check shapes, dtypes, devices and strides of all tensors.

        Raises:
            ValueError: one of them is not as `mla_decode` describes it.
        """
        q_latent, q_rope, latent_cache, rope_cache, cache_seqlens, block_table = self[:6]
        window, mask, mask_bounds, out = self.window, self.mask, self.mask_bounds, self.out
        batch, tokens, _, _ = q_latent.shape
        dtype, device = q_latent.dtype, q_latent.device
        paged = block_table is not None
        check_cache(
            latent_cache, rope_cache, self.row_format, self.rank, self.rope_dim, None if paged else batch, dtype, device
        )
        check_shape("out", out, *q_latent.shape)
        check_rows(dtype, device, q_latent=q_latent, q_rope=q_rope, out=out)
        expect((mask is None) != (cache_seqlens is None), lambda: "one of cache_seqlens and mask must be given")
        if mask is None:
            check_integers("cache_seqlens", cache_seqlens, device, batch)
            expect(cache_seqlens.is_contiguous(), lambda: "cache_seqlens must be contiguous")
        else:
            expect(window == 0, lambda: "a window cannot be combined with a mask: it is part of the mask")
            check_shape("mask", mask, batch, tokens, None if paged else latent_cache.shape[1])
            check_rows(torch.bool, device, mask=mask)
            check_integers("mask_bounds", mask_bounds, device, 3, batch)
            expect(mask_bounds.is_contiguous(), lambda: "mask_bounds must be contiguous")
        if paged:
            check_block_table(block_table, device, batch)


class SequenceMask(NamedTuple):
    """Which tokens the queries of each sequence see, as the kernels read it.

    Without a mask the kernels read `lengths` alone; the lengths then stand in for the other pointers.

    Attributes:
        starts: (B,) int32, first token that some query sees.
        lengths: (B,) int32, one past the last token that some query sees.
        has_gaps: (B,) int32, not 0 where the mask hides tokens in between.
        mask: (B, T, S) uint8, 1 where a query sees a token.
        shown: (B, S) uint8, 1 where some query of the sequence sees a token.
    """

    starts: Tensor
    lengths: Tensor
    has_gaps: Tensor
    mask: Tensor
    shown: Tensor

    @classmethod
    def of(cls, problem: DecodeProblem) -> SequenceMask:
        """The mask of a problem, or its lengths where it has none."""
        if problem.mask is None:
            lengths = problem.cache_seqlens
            rows = lengths.view(-1, 1, 1)
            return cls(lengths, lengths, lengths, rows, rows[:, 0])
        mask = problem.mask.view(torch.uint8)
        return cls(*problem.mask_bounds, mask, mask[:, 0] if mask.shape[1] == 1 else mask.amax(1))


def expect(condition: bool, message: Callable[[], str]) -> None:
    """Raise ValueError unless `condition`. The message is built only when it is needed, because no compiler could trace it."""
    if not condition:
        raise ValueError(message())


def check_shape(name: str, tensor: Tensor, *shape: int | None) -> None:
    """Raise ValueError unless `tensor` has this shape; None stands for any size."""
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    # a loop, because this runs at every launch and a generator takes twice as long
    for size, expected in zip(sizes, shape):  # noqa: B905
        fits = fits and (expected is None or size == expected)
    if not fits:
        expected_sizes = ", ".join("any" if expected is None else str(expected) for expected in shape)
        raise ValueError(f"{name} has shape {tuple(sizes)}, expected ({expected_sizes})")


def check_rows(dtype: torch.dtype, device: torch.device, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have this dtype and device, and a contiguous last dimension."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: the last dimension must be contiguous")


def check_cache(
    latent_cache: Tensor, rope_cache: Tensor | None, row_format: RowFormat | None, rank: int, rope_dim: int,
    outer: int | None, dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    """Raise ValueError unless this is a cache of numbers in `dtype`, or of packed rows where there is a format.

    Args:
        latent_cache: latents, or rows.
        rope_cache: rotary keys, or None.
        row_format: what the rows hold; None for a cache of numbers.
        rank: numbers of a latent.
        rope_dim: numbers of a rotary key.
        outer: sequences, or None for any number of pages.
        dtype: of the numbers.
        device: of the queries.
    """
    if row_format is None:
        expect(rope_cache is not None, lambda: "rope_cache is None, which only packed rows allow")
        check_shape("latent_cache", latent_cache, outer, None, rank)
        check_shape("rope_cache", rope_cache, *latent_cache.shape[:2], rope_dim)
        check_rows(dtype, device, latent_cache=latent_cache, rope_cache=rope_cache)
        return
    expect(rope_cache is None, lambda: "packed rows hold the rotary keys: rope_cache must be None")
    check_shape("latent_cache", latent_cache, outer, None, row_format.layout(rank, rope_dim).row_bytes)
    check_rows(torch.uint8, device, latent_cache=latent_cache)
    strides = latent_cache.stride()[:2]
    expect(
        all(stride % ALIGN == 0 for stride in strides),
        lambda: f"latent_cache: strides {strides} of packed rows must be multiples of {ALIGN}",
    )


def check_address(rows: Tensor) -> None:
    """Raise ValueError unless packed rows begin at a multiple of ALIGN: at the launch, as no compiler knows addresses."""
    expect(rows.data_ptr() % ALIGN == 0, lambda: f"latent_cache: packed rows must begin at a multiple of {ALIGN} bytes")


def check_widths(rank: int, rope_dim: int, heads: int) -> None:
    """Raise ValueError for a rank, rope dimension or head count that the kernels do not serve."""
    expect(
        rank % 16 == 0 and 16 <= rank <= MAX_RANK,
        lambda: f"rank is {rank}: a multiple of 16 from 16 to {MAX_RANK} is served",
    )
    expect(
        rope_dim % 16 == 0 and 0 <= rope_dim <= MAX_ROPE,
        lambda: f"rope dimension is {rope_dim}: a multiple of 16 from 0 to {MAX_ROPE} is served",
    )
    expect(1 <= heads <= MAX_HEADS, lambda: f"{heads} heads: 1 to {MAX_HEADS} are served")


def check_key_basis(key_basis: Tensor, row_format: RowFormat | None, latent: Tensor, rope_dim: int, heads: int) -> None:
    """Raise ValueError unless rows of this format can hold the rotary key as channels of 4 bits, and the basis is one."""
    rank = latent.shape[-1]
    check_widths(rank + rope_dim, 0, heads)
    expect(
        rope_dim % 2 == 0 and 2 <= rope_dim <= MAX_ROPE,
        lambda: f"rope dimension is {rope_dim}: an even number from 2 to {MAX_ROPE} is served",
    )
    expect(
        row_format is not None and row_format.wide <= rank and not (row_format.float8 or row_format.rope_float8),
        lambda: f"key_basis: rows of {row_format} with rank {rank} have no channels of 4 bits for a rotary key",
    )
    check_shape("key_basis", key_basis, rope_dim, rope_dim)
    check_rows(latent.dtype, latent.device, key_basis=key_basis)
    expect(key_basis.is_contiguous(), lambda: "key_basis must be contiguous")


def check_integers(name: str, tensor: Tensor, device: torch.device, *shape: int | None) -> None:
    """Raise ValueError unless `tensor` is int32, on the device and of this shape."""
    check_shape(name, tensor, *shape)
    expect(tensor.dtype == torch.int32, lambda: f"{name} has dtype {tensor.dtype}, expected torch.int32")
    expect(tensor.device == device, lambda: f"{name} is on {tensor.device}, expected {device}")


def check_block_table(block_table: Tensor, device: torch.device, batch: int) -> None:
    """Raise ValueError unless this is a block table (B, max_pages) with contiguous rows."""
    check_integers("block_table", block_table, device, batch, None)
    expect(block_table.shape[1] <= 1 or block_table.stride(1) == 1, lambda: "block_table: rows must be contiguous")


def check_queries(q_latent: Tensor, q_rope: Tensor) -> None:
    """Raise ValueError unless the queries have a shape and a dtype that the kernels serve."""
    expect(q_latent.dim() == 4, lambda: f"q_latent has {q_latent.dim()} dimensions, expected (B, T, H, r)")
    batch, tokens, heads, rank = q_latent.shape
    rope_dim = q_rope.shape[-1]
    check_widths(rank, rope_dim, heads)
    allowed = DTYPES if q_latent.is_cuda else (*DTYPES, torch.float64)
    expect(q_latent.dtype in allowed, lambda: f"q_latent has dtype {q_latent.dtype}, expected one of {allowed}")
    check_shape("q_rope", q_rope, batch, tokens, heads, rope_dim)


def check_options(softmax_scale: float, num_splits: int | None, softcap: float, window: int | None) -> None:
    """Raise ValueError for a number that is out of range."""
    expect(softmax_scale > 0, lambda: f"softmax_scale is {softmax_scale}, expected a positive number")
    expect(
        num_splits is None or 1 <= num_splits <= MAX_SPLITS,
        lambda: f"num_splits is {num_splits}, expected None or 1 to {MAX_SPLITS}",
    )
    expect(softcap >= 0, lambda: f"softcap is {softcap}, expected a positive number, or 0 for none")
    expect(window is None or window > 0, lambda: f"window is {window}, expected a positive number, or None")
