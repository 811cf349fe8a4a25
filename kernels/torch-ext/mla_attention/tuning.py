"""Launch parameters of the decode kernels: tile sizes, warps, pipeline depth, and the number of parts of a sequence."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class DecodeConfig:
    """Launch parameters of the kernel that attends.

    Attributes:
        block_m: query rows (heads x tokens) of a program.
        block_n: tokens in a tile.
        warps: warps of a program, as in Triton.
        stages: depth of the pipeline, as in Triton.
        per_sm: programs that share a multiprocessor; `choose_splits` makes that many.
        registers: most registers of a thread; 0 for no limit.
        pdl: programmatic dependent launch: a launch overlaps the end of the kernel before it.
        hopper: the CUDA kernel of hopper_decode.cu: block_m is 64, block_n 32 or 64, and warps does not apply.
        min_tiles: fewest tiles of a program of the CUDA kernel.
    """

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2
    per_sm: int = 1
    registers: int = 0
    pdl: bool = False
    hopper: bool = False
    min_tiles: int = 1


# Fastest configurations measured (docs/results/speed.md) by card, rank, rope dimension and most query rows. For a card or a shape
# that is not listed, `default_config` shrinks tiles until they fit.
TUNED = {
    ("NVIDIA H100 80GB HBM3", 512, 64, 16): DecodeConfig(16, 32, stages=3),
    ("NVIDIA H100 80GB HBM3", 512, 64, 32): DecodeConfig(32, 32, stages=3),
    ("NVIDIA H100 80GB HBM3", 512, 64, 64): DecodeConfig(64, 64, warps=8),
    ("NVIDIA H100 80GB HBM3", 512, 64, 128): DecodeConfig(64, 64, warps=8),
    ("NVIDIA H100 80GB HBM3", 256, 64, 32): DecodeConfig(32, 64, stages=3),
    ("NVIDIA H100 80GB HBM3", 160, 32, 16): DecodeConfig(16, 64, stages=3, per_sm=2, pdl=True),
    ("NVIDIA H100 80GB HBM3", 96, 32, 32): DecodeConfig(32, 64, stages=3, per_sm=2, pdl=True),
}


# Capacity up to which half of the multiprocessors serve one sequence best, and two thirds above.
SHORT = 32768


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def rank_chunks(rank: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, that cover the rank with least padding: 512 -> (512, 0), 576 -> (512, 64)."""
    whole = power_of_two(rank)
    if whole == rank or rank < 32:
        return max(whole, 16), 0
    first = whole // 2
    return first, max(power_of_two(rank - first), 16)


def shared_memory(config: DecodeConfig, rank: int, rope_dim: int, bytes_per_number: int) -> int:
    """Estimate of the shared memory of a program of the Triton kernel, in bytes: its queries and its tiles.

    Triton keeps one tile fewer than there are stages; with 64 rows or more Hopper's asynchronous products read the keys, and
    it keeps one tile more.
    """
    width = sum(rank_chunks(rank)) + (max(power_of_two(rope_dim), 16) if rope_dim else 0)
    tiles = max(config.stages - (config.block_m < 64), 1)
    return bytes_per_number * width * (config.block_m + config.block_n * tiles)


def default_config(
    rank: int, rope_dim: int, rows: int, dtype: torch.dtype, shared_limit: int = 227 * 1024, card: str = ""
) -> DecodeConfig:
    """The Triton kernel's fastest measured configuration on a card, or one that fits its shared memory.

    Args:
        rank: numbers of a latent.
        rope_dim: numbers of a rotary key.
        rows: heads times query tokens.
        dtype: dtype of queries and cache.
        shared_limit: bytes of shared memory that a program may use.
        card: the device's name, as in TUNED.
    """
    if dtype != torch.float32:
        listed = [key for key in TUNED if key[:3] == (card, rank, rope_dim) and key[3] >= rows]
        if listed:
            return TUNED[min(listed)]
    block_m = min(max(power_of_two(rows), 16), 64 if rank <= 576 else 32)
    if dtype == torch.float32:
        # Exact float32 products do not use the tensor cores, and large tiles spill registers.
        config = DecodeConfig(block_m=16, block_n=16, stages=1)
    elif block_m == 64:
        config = DecodeConfig(block_m=64, block_n=64, warps=8, stages=2)
    else:
        config = DecodeConfig(block_m, 32 if rank > 256 else 64, warps=4 if rank <= 576 else 8, stages=3)
    while shared_memory(config, rank, rope_dim, dtype.itemsize) > shared_limit and config.block_n > 16:
        config = replace(config, block_n=config.block_n // 2)
    while shared_memory(config, rank, rope_dim, dtype.itemsize) > shared_limit and config.stages > 1:
        config = replace(config, stages=config.stages - 1)
    # Measured: wide ranks are faster with one program on each multiprocessor even where two fit.
    fit_twice = 2 * (shared_memory(config, rank, rope_dim, dtype.itemsize) + 2048) <= shared_limit
    return replace(config, per_sm=2) if fit_twice and config.warps == 4 and rank < 256 else config


def choose_splits(config: DecodeConfig, processors: int, programs: int, capacity: int, paged: bool) -> int:
    """Number of parts into which every sequence is cut. The host knows the cache's capacity and not the lengths.

    One program for every place on the card, or two where the cache is paged, because lengths then tend to differ. With more
    sequences than places, the number of parts, up to four, that leaves the fewest places idle in the last wave.

    Args:
        config: launch parameters of the kernel.
        processors: multiprocessors of the device.
        programs: programs of uncut sequences: batch times row blocks.
        capacity: tokens that the cache has room for in each sequence.
        paged: whether the cache is paged.
    """
    places = processors * config.per_sm
    useful = max(min(capacity // (2 * config.block_n), 1024), 1)
    if programs <= places:
        return min(max((1 + paged) * places // programs, 1), useful)

    def lost(splits: int) -> float:
        waves = programs * splits / places
        return -(-(programs * splits) // places) / waves

    return min(range(1, min(useful, 4) + 1), key=lambda splits: (round(lost(splits), 2), splits))


def hopper_groups(rank: int) -> int:
    """Number of the CUDA kernel's warpgroups that compute; one more loads tiles."""
    return 3 if rank <= 128 else 2


def hopper_shared_memory(rank: int, rope_dim: int, block_n: int, stages: int) -> int:
    """Shared memory of a program of the CUDA kernel, in bytes: queries, tiles, exchange buffer, barriers and alignment."""
    columns = -(-rank // 64) + -(-rope_dim // 64)
    exchanged = 64 * block_n * 2 if rank > 256 else (hopper_groups(rank) - 1) * 64 * 32 * 4
    return columns * 128 * (64 + block_n * stages) + exchanged + 6 * 64 * 4 + 16 * stages + 32 + 1024


@functools.cache
def hopper_config(rank: int, rope_dim: int, shared_limit: int = 227 * 1024) -> DecodeConfig | None:
    """Launch parameters of the CUDA kernel with as many stages as fit, or None where fewer than two fit."""
    if rank > 576:
        return None
    # Warpgroups that take turns at tiles each have stages of their own: one that waits on a barrier must see its every phase.
    step = hopper_groups(rank) if rank <= 256 else 1
    for block_n in (64, 32):
        for stages in range(8 // step * step, 1, -step):
            if hopper_shared_memory(rank, rope_dim, block_n, stages) <= shared_limit:
                return DecodeConfig(64, block_n, stages=stages, pdl=True, hopper=True, min_tiles=2)
    return None


def hopper_workers(processors: int, row_blocks: int, batch: int, capacity: int) -> int:
    """Number of the CUDA kernels' programs for every block of query rows.

    One sequence alone gets fewer than there are multiprocessors, because every program leaves a part to combine. On an H200 at
    512 + 64 with 32 heads, 66, 88 and 132 programs take 19.1, 19.7 and 24.8 us for 16k tokens (e4m3 19.1, 20.7, 25.2; int4 20.5,
    21.3, 25.2), and 41.1, 36.8 and 38.9 us for 64k (e4m3 34.9, 32.2, 34.3). Other sizes were not measured.

    Args:
        processors: multiprocessors of the device.
        row_blocks: blocks of query rows of a sequence.
        batch: sequences.
        capacity: tokens that the cache has room for in each sequence.
    """
    if batch > 1 or row_blocks > 1:
        return max(processors // row_blocks, 1)
    return max(processors // 2 if capacity <= SHORT else processors * 2 // 3, 1)


def hopper_parts(workers: int, batch: int, capacity: int) -> int:
    """Number of parts into which the CUDA kernel cuts every sequence of a batch whose lengths are likely equal.

    0 stands for an even distribution of all tiles, which suits any lengths and has a few programs work on two sequences.
    """
    parts = workers // batch
    enough = parts * batch * 16 >= workers * 15 and capacity >= parts * 4 * 64
    return parts if batch > 1 and enough else 0
