"""Launch of the decode kernels on packed rows."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import torch
import triton.language as tl

from .decode import HOPPER, LOG2E, attempt, combine_triton
from .hopper_packed import launch_packed_hopper, packed_hopper_config, packed_hopper_possible
from .problem import DecodeProblem, SequenceMask, check_address
from .tuning import DecodeConfig, choose_splits, power_of_two, rank_chunks


@functools.cache
def _hardware(device: torch.device) -> int:
    """2 where the card converts e4m3 and is programmed in PTX, 1 where it only is programmed in PTX, else 0."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    return 2 if torch.cuda.get_device_capability(device) >= (8, 9) else 1


def chunks(channels: int) -> tuple[int, int]:
    """`rank_chunks` of a section, or (0, 0) where it is empty."""
    return rank_chunks(channels) if channels else (0, 0)


def packed_shared_memory(config: DecodeConfig, problem: DecodeProblem) -> int:
    """Estimate of the shared memory of a program, in bytes: queries and dequantised tile, and the tiles of bytes on their way."""
    wide, size = problem.row_format.wide, 4 if problem.q_latent.dtype == torch.float32 else 2
    half = (problem.rank - wide) // 2
    width = (
        sum(chunks(wide)) + 2 * sum(chunks(half)) + (max(power_of_two(problem.rope_dim), 16) if problem.rope_dim else 0)
    )
    return width * size * (config.block_m + config.block_n) + problem.layout.row_bytes * config.block_n * max(
        config.stages - 1, 0
    )


def packed_config(problem: DecodeProblem, shared_limit: int) -> DecodeConfig:
    """Launch parameters that fit the shared memory of the card."""
    rows, rank = problem.rows, problem.rank
    if problem.q_latent.dtype == torch.float32:
        # Exact float32 products do not use the tensor cores, and large tiles spill registers.
        config = DecodeConfig(16, 16, stages=1)
    else:
        block_m = min(max(power_of_two(rows), 16), 64 if rank <= 256 else 32)
        # Measured on an H200 at 512 + 64: 32 rows with 8 warps and 64 tokens 192 us, with 4 and 32 275 us.
        many = block_m * rank > 8192
        config = DecodeConfig(block_m, 64 if rank <= 256 or many else 32, warps=8 if many else 4, stages=3)
    while packed_shared_memory(config, problem) > shared_limit and config.block_n > 16:
        config = replace(config, block_n=config.block_n // 2)
    while packed_shared_memory(config, problem) > shared_limit and config.stages > 1:
        config = replace(config, stages=config.stages - 1)
    fit_twice = 2 * (packed_shared_memory(config, problem) + 2048) <= shared_limit
    return replace(config, per_sm=2) if fit_twice and config.warps == 4 and rank <= 256 else config


def launch_packed(
    problem: DecodeProblem,
    seen: SequenceMask,
    processors: int,
    shared_limit: int,
    config: DecodeConfig | None,
) -> None:
    """Attend to packed rows and combine the parts.

    Args:
        problem: checked, with a format.
        seen: its mask.
        processors: multiprocessors of the device.
        shared_limit: bytes of shared memory that a program may use.
        config: launch parameters; None takes those of the shape.
    """
    check_address(problem.latent_cache)
    if config is None and os.environ.get(HOPPER) != "0":
        config = packed_hopper_config(problem, shared_limit)
    if config and config.hopper:
        known = config
        if packed_hopper_possible(problem) and attempt(lambda: launch_packed_hopper(problem, seen, processors, known)):
            return
        config = None
    config = config or packed_config(problem, shared_limit)
    _launch_triton(problem, seen, processors, config)


def _launch_triton(problem: DecodeProblem, seen: SequenceMask, processors: int, config: DecodeConfig) -> None:
    """Launch the Triton kernels: attention of every part, and the combination of the parts."""
    from .packed_kernels import mla_decode_packed_kernel_split

    q_latent, q_rope, rows, block_table, out = (
        problem.q_latent, problem.q_rope, problem.latent_cache, problem.block_table, problem.out,
    )  # fmt: skip
    batch, tokens, heads, rank = q_latent.shape
    rope_dim, count, page_size, form, at = (
        problem.rope_dim,
        problem.rows,
        problem.page_size,
        problem.row_format,
        problem.layout,
    )
    row_blocks = -(-count // config.block_m)
    splits = problem.num_splits or choose_splits(
        config, processors, batch * row_blocks, problem.capacity, bool(page_size)
    )
    slots = batch * splits if splits > 1 else 0
    part = torch.empty(slots, count, rank, dtype=torch.float32, device=out.device)
    part_lse = torch.empty(slots, count, dtype=torch.float32, device=out.device)
    a0, a1 = chunks(form.wide)
    b0, b1 = chunks((rank - form.wide) // 2)
    stages = config.stages + (1 if page_size and config.stages > 1 else 0)
    whole = q_latent.dtype == torch.float32
    mla_decode_packed_kernel_split[(row_blocks, batch * splits)](
        q_latent, q_rope, rows, rows.view(torch.float16), rows.view(torch.bfloat16),
        seen.lengths, seen.starts, seen.has_gaps, seen.mask, seen.shown,
        seen.lengths if block_table is None else block_table, out, problem.lse, part, part_lse,
        problem.softmax_scale * LOG2E, problem.softcap, problem.window, tokens, heads,
        *q_latent.stride()[:3], *q_rope.stride()[:3], rows.stride(0),
        0 if block_table is None else block_table.stride(0), *out.stride()[:3], *seen.mask.stride()[:2],
        seen.shown.stride(0), stride_cn=rows.stride(1), rank=rank, rope_dim=rope_dim, WIDE=form.wide,
        FLOAT8=bool(form.float8), GROUP=form.group, ROPE8=bool(form.rope_float8), CODES4=at.codes4, ROPE_AT=at.rope,
        SCALES=at.scales, GROUPS8=at.groups8, GROUPS=at.groups, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        A0=a0, A1=a1, B0=b0, B1=b1, ROPE=max(power_of_two(rope_dim), 16) if rope_dim else 0, PAGE=page_size,
        SPLITS=splits, MASK=problem.mask is not None, WINDOW=problem.window > 0, SOFTCAP=problem.softcap > 0,
        PRECISION="ieee" if whole else "tf32", HARDWARE=_hardware(q_latent.device),
        DOT=tl.float32 if whole else tl.float16, NORMALISE=q_latent.dtype == torch.bfloat16, PDL=config.pdl,
        STAGES=stages, num_warps=config.warps, num_stages=stages, **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip
    if splits > 1:
        combine_triton(problem, seen, part, part_lse, splits, processors, config)
