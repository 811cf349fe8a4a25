"""Launch of the decode kernels on tensors that are known to be right (`mla_decode` checks them)."""

import functools

import torch
from torch import Tensor

from .tuning import DecodeConfig, default_config, power_of_two, rank_chunks

# Parts of a row that the combine kernel weighs at a time.
_PART_CHUNK = 16


@functools.cache
def _device_limits(index: int) -> tuple[int, int]:
    """Multiprocessors of a CUDA device, and bytes of shared memory that one program may have."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def device_limits(device: torch.device) -> tuple[int, int]:
    """The same for any device; elsewhere (Triton's interpreter) a small machine, so that small tests share out work."""
    if device.type != "cuda":
        return 4, 227 * 1024
    return _device_limits(torch.cuda.current_device() if device.index is None else device.index)


def _tensor_map(cache: Tensor, block_n: int, width: int):
    """Tensor map of a cache (outer, inner, d) as a matrix of rows, and the rows from one outer index to the next."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    stride = cache.stride(1)
    rows_per_outer = cache.stride(0) // stride if cache.shape[0] > 1 else cache.shape[1]
    rows = (cache.shape[0] - 1) * rows_per_outer + cache.shape[1]
    return TensorDescriptor(cache, [rows, cache.shape[2]], [stride, 1], [block_n, width]), rows_per_outer


def tma_possible(caches: list[Tensor], page_size: int, config: DecodeConfig) -> bool:
    """Whether full tiles can be described to the tensor memory accelerator: 16-byte steps, tiles within one page."""
    if page_size and page_size % config.block_n:
        return False
    return all(
        cache.data_ptr() % 16 == 0
        and cache.stride(1) * cache.element_size() % 16 == 0
        and (cache.shape[0] == 1 or cache.stride(0) % cache.stride(1) == 0)
        for cache in caches
        if cache.shape[2]
    )


def decode_triton(
    q_latent: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    softmax_scale: float,
    num_splits: int,
    softcap: float,
    window: int,
    out: Tensor,
    lse: Tensor,
    config: DecodeConfig | None = None,
) -> None:
    """Fill `out` (B, T, H, r) and `lse` (B, H, T). `num_splits` 0 shares all tiles out evenly; `window` 0 is none.

    Reads nothing back from the device, so that it can be captured in a CUDA graph.
    """
    from .decode_kernels import mla_decode_fwd_kernel_combine, mla_decode_fwd_kernel_split

    batch, tokens, heads, rank = q_latent.shape
    rope_dim = q_rope.shape[3]
    rows = tokens * heads
    if batch == 0 or rows == 0:
        return
    processors, shared_limit = device_limits(q_latent.device)
    config = config or default_config(rank, rope_dim, rows, q_latent.dtype, shared_limit)
    r0, r1 = rank_chunks(rank)
    rope = max(power_of_two(rope_dim), 16) if rope_dim else 0
    page_size = 0 if block_table is None else latent_cache.shape[1]
    row_blocks = -(-rows // config.block_m)
    workers = batch * num_splits if num_splits else max(processors * config.per_sm // row_blocks, 1)
    parts = num_splits or workers
    single = num_splits == 1
    slots = 0 if single else (workers if num_splits else 2 * workers)
    part = torch.empty(slots, rows, rank, dtype=torch.float32, device=out.device)
    part_lse = torch.empty(slots, rows, dtype=torch.float32, device=out.device)
    batch_padded = power_of_two(batch)

    tma = config.tma and tma_possible([latent_cache, rope_cache], page_size, config)
    c0_map = c1_map = kr_map = latent_cache
    c_rows = k_rows = 0
    if tma:
        c0_map, c_rows = _tensor_map(latent_cache, config.block_n, r0)
        if r1:
            c1_map, _ = _tensor_map(latent_cache, config.block_n, r1)
        if rope:
            kr_map, k_rows = _tensor_map(rope_cache, config.block_n, rope)
    # The look-up of a page is a stage of its own in the pipeline: with one more, as many tiles stay in flight.
    stages = config.stages + (1 if page_size and config.stages > 1 else 0)
    options = {"num_warps": config.warps, "num_stages": stages}
    if config.registers:
        options["maxnreg"] = config.registers
    if config.pdl:
        options["launch_pdl"] = True

    mla_decode_fwd_kernel_split[(row_blocks, workers)](
        q_latent, q_rope, latent_cache, rope_cache, c0_map, c1_map, kr_map, cache_seqlens,
        cache_seqlens if block_table is None else block_table, out, lse, part, part_lse,
        softmax_scale * 1.4426950408889634, softcap, window, batch, tokens, heads, workers, config.min_tiles,
        *q_latent.stride()[:3], *q_rope.stride()[:3], latent_cache.stride(0), rope_cache.stride(0),
        0 if block_table is None else block_table.stride(0), *out.stride()[:3], c_rows, k_rows,
        # Between tokens: a model has one, and known in advance it spares a register for every row that a thread loads.
        stride_cn=latent_cache.stride(1), stride_kn=rope_cache.stride(1),
        rank=rank, rope_dim=rope_dim, BATCH=batch_padded, BLOCK_M=config.block_m, BLOCK_N=config.block_n, R0=r0, R1=r1,
        ROPE=rope, PAGE=page_size, SPLITS=num_splits, SWAP=config.swap,
        TMA=tma, WINDOW=window > 0, SOFTCAP=softcap > 0,
        PRECISION="ieee" if q_latent.dtype == torch.float32 else "tf32",
        PDL=config.pdl, STAGES=stages, **options,
    )  # fmt: skip
    if single:
        return
    # Few rows: shorter pieces of the rank, so that enough programs fetch the parts.
    rank_chunk = min(power_of_two(rank), 128 if batch * rows * 4 <= processors * 8 else 512)
    mla_decode_fwd_kernel_combine[(batch * rows, -(-rank // rank_chunk))](
        part, part_lse, cache_seqlens, out, lse, window, batch, tokens, heads, rank, workers, config.min_tiles,
        *out.stride()[:3],
        BATCH=batch_padded, BLOCK_N=config.block_n, RANK_CHUNK=rank_chunk, PARTS=power_of_two(parts),
        PART_CHUNK=min(_PART_CHUNK, power_of_two(parts)), SPLITS=num_splits, WINDOW=window > 0, PDL=config.pdl,
        num_warps=4, **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip
