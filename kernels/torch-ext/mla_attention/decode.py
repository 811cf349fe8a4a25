"""Launch of the decode kernels on a checked `DecodeProblem`."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .problem import DecodeProblem, SequenceMask
from .tuning import (
    DecodeConfig,
    choose_splits,
    default_config,
    hopper_config,
    hopper_parts,
    hopper_workers,
    power_of_two,
    rank_chunks,
)

LOG2E = 1.4426950408889634
# Environment variable; 0 selects the Triton kernels on Hopper, too.
HOPPER = "MLA_ATTENTION_HOPPER"
# Whether an attempt to compile the CUDA kernels has failed.
_unavailable = False


@functools.cache
def _device_limits(index: int) -> tuple[int, int, str]:
    """Multiprocessors of a CUDA device, bytes of shared memory that a program may use, and the device's name."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.name


def device_limits(device: torch.device) -> tuple[int, int, str]:
    """`_device_limits` of any device; for Triton's interpreter those of a small one, so that small tests split sequences."""
    if device.type != "cuda":
        return 4, 227 * 1024, ""
    return _device_limits(torch.cuda.current_device() if device.index is None else device.index)


def tma_possible(caches: list[Tensor], page_size: int, block_n: int) -> bool:
    """Whether the tensor memory accelerator can load tiles: strides of 16 bytes, and tiles of whole pages or within a page."""
    if page_size and page_size % block_n and page_size not in (16, 32):
        return False
    return all(
        cache.data_ptr() % 16 == 0
        and cache.stride(1) * cache.element_size() % 16 == 0
        and (cache.shape[0] == 1 or cache.stride(0) % cache.stride(1) == 0)
        for cache in caches
        if cache.shape[2]
    )


def hopper_possible(problem: DecodeProblem, block_n: int) -> bool:
    """Whether the Hopper kernel can serve a problem on this device, with tiles of `block_n` tokens."""
    query, out = problem.q_latent, problem.out
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device) == (9, 0)
        and query.dtype in (torch.bfloat16, torch.float16)
        and problem.latent_cache.shape[1] > 0
        and tma_possible([problem.latent_cache, problem.rope_cache], problem.page_size, block_n)
        and out.data_ptr() % 16 == 0
        and all(stride % 4 == 0 for stride in out.stride()[:3])
    )


def _triton_options(config: DecodeConfig, page_size: int) -> dict[str, int | bool]:
    """Launch options of the split kernel."""
    # The look-up of a page is a stage of its own in the pipeline: one more stage keeps as many tiles in flight.
    stages = config.stages + (1 if page_size and config.stages > 1 else 0)
    options = {"num_warps": config.warps, "num_stages": stages}
    if config.registers:
        options["maxnreg"] = config.registers
    if config.pdl:
        options["launch_pdl"] = True
    return options


def _launch_triton(
    problem: DecodeProblem, seen: SequenceMask, num_splits: int, processors: int, config: DecodeConfig
) -> None:
    """Launch the Triton kernels: attention of every part, and the combination of the parts."""
    from .decode_kernels import mla_decode_fwd_kernel_split

    q_latent, q_rope, latent_cache, rope_cache, _, block_table, softmax_scale, _, softcap, window, mask, _, out, lse = (
        problem[:14]
    )
    batch, tokens, heads, rank = q_latent.shape
    rope_dim, rows, page_size = q_rope.shape[3], tokens * heads, problem.page_size
    r0, r1 = rank_chunks(rank)
    slots = batch * num_splits if num_splits > 1 else 0
    part = torch.empty(slots, rows, rank, dtype=torch.float32, device=out.device)
    part_lse = torch.empty(slots, rows, dtype=torch.float32, device=out.device)
    options = _triton_options(config, page_size)
    mla_decode_fwd_kernel_split[(-(-rows // config.block_m), batch * num_splits)](
        q_latent, q_rope, latent_cache, rope_cache, seen.lengths, seen.starts, seen.has_gaps, seen.mask, seen.shown,
        seen.lengths if block_table is None else block_table, out, lse, part, part_lse,
        softmax_scale * LOG2E, softcap, window, tokens, heads,
        *q_latent.stride()[:3], *q_rope.stride()[:3], latent_cache.stride(0), rope_cache.stride(0),
        0 if block_table is None else block_table.stride(0), *out.stride()[:3],
        *seen.mask.stride()[:2], seen.shown.stride(0),
        # Strides between tokens are constants: a model has one, and a constant saves a register for every row of a thread.
        stride_cn=latent_cache.stride(1), stride_kn=rope_cache.stride(1),
        rank=rank, rope_dim=rope_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, R0=r0, R1=r1,
        ROPE=max(power_of_two(rope_dim), 16) if rope_dim else 0, PAGE=page_size, SPLITS=num_splits,
        MASK=mask is not None, WINDOW=window > 0, SOFTCAP=softcap > 0,
        PRECISION="ieee" if q_latent.dtype == torch.float32 else "tf32", PDL=config.pdl, STAGES=options["num_stages"],
        **options,
    )  # fmt: skip
    if num_splits > 1:
        combine_triton(problem, seen, part, part_lse, num_splits, processors, config)


def combine_triton(
    problem: DecodeProblem, seen: SequenceMask, part: Tensor, part_lse: Tensor, num_splits: int, processors: int,
    config: DecodeConfig,
) -> None:  # fmt: skip
    """Launch the Triton kernel that combines the parts of every row."""
    from .decode_kernels import mla_decode_fwd_kernel_combine

    out, window = problem.out, problem.window
    batch, tokens, heads, rank = problem.q_latent.shape
    rows = tokens * heads
    # With few rows, shorter pieces of the rank let enough programs fetch the parts.
    rank_chunk = min(power_of_two(rank), 128 if batch * rows * 4 <= processors * 8 else 512)
    parts = power_of_two(num_splits)
    mla_decode_fwd_kernel_combine[(batch * rows, -(-rank // rank_chunk))](
        part, part_lse, seen.lengths, seen.starts, out, problem.lse, window, tokens, heads, rank, *out.stride()[:3],
        BLOCK_N=config.block_n, RANK_CHUNK=rank_chunk, PARTS=parts, PART_CHUNK=min(8192 // rank_chunk, parts),
        SPLITS=num_splits, MASK=problem.mask is not None, WINDOW=window > 0, PDL=config.pdl, num_warps=4,
        **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip


def _launch_hopper(
    problem: DecodeProblem, seen: SequenceMask, num_splits: int, workers: int, config: DecodeConfig
) -> bool:
    """Launch the CUDA kernels, if possible."""
    from .hopper import hopper_launch

    return attempt(lambda: hopper_launch(problem, seen, num_splits, workers, config))


def attempt(launch: Callable[[], None]) -> bool:
    """Launch CUDA kernels. Where they cannot be compiled or loaded, return False, and warn the first time."""
    global _unavailable
    if _unavailable:
        return False
    from .nvrtc import KernelUnavailableError

    try:
        launch()
    except KernelUnavailableError as error:
        _unavailable = True
        warnings.warn(f"mla_attention: the CUDA kernels for Hopper do not serve here: {error}", stacklevel=2)
        return False
    return True


def launch_decode(problem: DecodeProblem, config: DecodeConfig | None = None) -> None:
    """Fill `out` and `lse` of a problem. Reads nothing back from the device, so that a CUDA graph can capture it.

    Args:
        problem: checked tensors and options; a `num_splits` of 0 is chosen here.
        config: tile sizes and pipeline of the kernel; None takes those of the device and the shape.
    """
    batch, tokens, heads, rank = problem.q_latent.shape
    rope_dim, rows = problem.rope_dim, tokens * heads
    if batch == 0 or rows == 0:
        return
    processors, shared_limit, card = device_limits(problem.q_latent.device)
    seen = SequenceMask.of(problem)
    if problem.row_format is not None:
        from .packed import launch_packed

        launch_packed(problem, seen, processors, shared_limit, config)
        return
    if config is None and os.environ.get(HOPPER) != "0":
        config = hopper_config(rank, rope_dim, shared_limit)
    num_splits = problem.num_splits
    if config and config.hopper:
        workers = hopper_workers(processors, -(-rows // config.block_m), batch, problem.capacity)
        parts = num_splits
        if not (parts or problem.page_size or problem.mask is not None):
            # Pages and masks indicate sequences of different lengths, for which equal parts would be uneven work.
            parts = hopper_parts(workers, batch, problem.latent_cache.shape[1])
        if hopper_possible(problem, config.block_n) and _launch_hopper(problem, seen, parts, workers, config):
            return
        config = None
    config = config or default_config(rank, rope_dim, rows, problem.q_latent.dtype, shared_limit, card)
    if not num_splits:
        row_blocks = -(-rows // config.block_m)
        num_splits = choose_splits(config, processors, batch * row_blocks, problem.capacity, bool(problem.page_size))
    _launch_triton(problem, seen, num_splits, processors, config)
