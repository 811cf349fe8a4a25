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
    hopper: bool = False
    rows_split: bool = False
    left: int = 0


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


def hopper_chunks(rank: int, rope_dim: int) -> tuple[int, int, int]:
    """Chunks of 64 columns of the latent, chunks of the rotary key, and the width of those: powers of two up to 64."""
    width = min(max(power_of_two(rope_dim), 16), 64)
    return -(-rank // 64), -(-rope_dim // width), width


def padded_groups(rank: int, left: int = 0) -> tuple[int, int, int, int]:
    """Chunks of 64 columns: two groups for the left warpgroup, two for the right, powers of two or 0."""
    chunks = -(-rank // 64)
    left = left or -(-chunks // 2)

    def cut(count: int) -> tuple[int, int]:
        whole = 1 << max(count.bit_length() - 1, 0)
        return (whole, power_of_two(count - whole) if count > whole else 0) if count else (0, 0)

    return cut(left) + cut(chunks - left)


def padded_shared_memory(config: DecodeConfig, rank: int, rope_dim: int) -> int:
    """Shared memory of a program of the padded Hopper kernel, in bytes."""
    _, ropes, width = hopper_chunks(rank, rope_dim)
    columns = sum(padded_groups(rank, config.left)) * 64 + ropes * width
    return 2 * (columns * (config.block_n * config.stages + 64) + 64 * config.block_n) + 1024


def hopper_shared_memory(config: DecodeConfig, rank: int, rope_dim: int) -> int:
    """Shared memory of a program of the Hopper kernel, in bytes: tiles, queries, weights, and what reductions need."""
    chunks, ropes, width = hopper_chunks(rank, rope_dim)
    columns = chunks * 64 + ropes * width
    groups = config.warps // 4
    rows = config.block_m // groups if config.rows_split else config.block_m
    return 2 * (columns * (64 * config.stages + config.block_m) + groups * 64 * rows) + 2048


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


def hopper_config(rank: int, rope_dim: int, shared_limit: int = 227 * 1024) -> DecodeConfig | None:
    """The Hopper kernel with as many stages as fit, or None where not one does."""
    chunks = -(-rank // 64)
    small = chunks <= 2
    left, per_sm = (chunks, 2) if small else (0, 1)
    for stages in range(8, 0, -1):
        config = DecodeConfig(64, 64, stages=stages, per_sm=per_sm, pdl=True, hopper=True, left=left)
        if per_sm * (padded_shared_memory(config, rank, rope_dim) + 1024) <= shared_limit:
            return config
    return None


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
