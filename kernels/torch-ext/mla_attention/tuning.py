"""How the decode kernel is cut up: tile sizes, warps, pipeline depth, and how many programs share a multiprocessor."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class DecodeConfig:
    """One way to launch the split kernel.

    block_m: query rows (heads x tokens) a program serves. block_n: tokens in a tile. swap: scores as (tokens, rows), see
    decode_kernels. warps, stages: as Triton's. per_sm: programs that share a multiprocessor when work is shared out
    evenly. min_tiles: fewest tiles worth a program of their own. registers: cap per thread, 0 for none. tma: load full
    tiles by the tensor memory accelerator. pdl: let a kernel's launch overlap the end of the one before.
    """

    block_m: int
    block_n: int
    swap: bool = False
    warps: int = 4
    stages: int = 2
    per_sm: int = 1
    min_tiles: int = 1
    registers: int = 0
    tma: bool = False
    pdl: bool = False


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def rank_chunks(rank: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, that hold the rank with least padding: 512 -> (512, 0), 576 -> (512, 64)."""
    whole = power_of_two(rank)
    if whole == rank or rank < 32:
        return max(whole, 16), 0
    first = whole // 2
    return first, max(power_of_two(rank - first), 16)


def tiles_held(config: DecodeConfig) -> int:
    """Tiles that a program has room for in shared memory.

    Triton keeps one tile fewer than there are stages, and one more where Hopper's asynchronous products read the keys,
    which takes 64 rows of their first operand.
    """
    asynchronous = (config.block_n if config.swap else config.block_m) >= 64
    return max(config.stages - (not asynchronous), 1)


def shared_memory(config: DecodeConfig, rank: int, rope_dim: int, bytes_per_number: int) -> int:
    """Estimate of the shared memory of a program, in bytes: its queries and its tiles."""
    width = sum(rank_chunks(rank)) + (max(power_of_two(rope_dim), 16) if rope_dim else 0)
    return bytes_per_number * width * (config.block_m + config.block_n * tiles_held(config))


def default_config(
    rank: int, rope_dim: int, rows: int, dtype: torch.dtype, shared_limit: int = 227 * 1024
) -> DecodeConfig:
    """A configuration that runs on any card with `shared_limit` bytes of shared memory for a program.

    `rows` is heads times query tokens. Tiles shrink until they fit.
    """
    block_m = min(max(power_of_two(rows), 16), 64)
    if dtype == torch.float32:
        # Exact products run on the ordinary units, where large tiles only spill.
        config = DecodeConfig(block_m=16, block_n=16, warps=4, stages=1)
    elif block_m == 64:
        config = DecodeConfig(block_m=64, block_n=64, warps=8, stages=2)
    else:
        config = DecodeConfig(block_m=block_m, block_n=32 if rank > 256 else 64, warps=4, stages=3)
    while shared_memory(config, rank, rope_dim, dtype.itemsize) > shared_limit and config.block_n > 16:
        config = replace(config, block_n=config.block_n // 2)
    while shared_memory(config, rank, rope_dim, dtype.itemsize) > shared_limit and config.stages > 1:
        config = replace(config, stages=config.stages - 1)
    fit_twice = 2 * (shared_memory(config, rank, rope_dim, dtype.itemsize) + 2048) <= shared_limit
    return replace(config, per_sm=2) if fit_twice and config.warps == 4 else config
