"""Launch of the decode kernels on tensors that are known to be right (`mla_decode` checks them)."""

import functools
import os
import warnings

import torch
from torch import Tensor

from .tuning import (
    DecodeConfig,
    choose_splits,
    default_config,
    hopper_config,
    hopper_parts,
    power_of_two,
    rank_chunks,
)

LOG2E = 1.4426950408889634
# 0 for the Triton kernels on Hopper, too.
HOPPER = "MLA_ATTENTION_HOPPER"
# Whether the CUDA kernels were tried and could not be compiled.
_refused = False


@functools.cache
def _device_limits(index: int) -> tuple[int, int, str]:
    """Multiprocessors of a CUDA device, bytes of shared memory that one program may have, and its name."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.name


def device_limits(device: torch.device) -> tuple[int, int, str]:
    """The same for any device; elsewhere (Triton's interpreter) a small machine, so that small tests share out work."""
    if device.type != "cuda":
        return 4, 227 * 1024, ""
    return _device_limits(torch.cuda.current_device() if device.index is None else device.index)


class Visible:
    """What the kernels are told of the tokens that a query may see; pointers that are not read stand in for no mask."""

    def __init__(self, cache_seqlens: Tensor | None, mask: Tensor | None, extent: Tensor | None):
        self.masked = mask is not None
        self.starts, self.lengths, self.holes = extent if self.masked else (cache_seqlens,) * 3
        self.mask = mask.view(torch.uint8) if self.masked else cache_seqlens.view(-1, 1, 1)
        # Tokens that some query sees, (B, S).
        self.shown = self.mask[:, 0] if self.mask.shape[1] == 1 else self.mask.amax(1)


def tma_possible(caches: list[Tensor], page_size: int, block_n: int) -> bool:
    """Whether tiles can be described to the tensor memory accelerator: 16-byte steps, tiles made of whole pages or within one."""
    if page_size and page_size % block_n and page_size not in (16, 32):
        return False
    return all(
        cache.data_ptr() % 16 == 0
        and cache.stride(1) * cache.element_size() % 16 == 0
        and (cache.shape[0] == 1 or cache.stride(0) % cache.stride(1) == 0)
        for cache in caches
        if cache.shape[2]
    )


def hopper_possible(
    q_latent: Tensor, latent_cache: Tensor, rope_cache: Tensor, out: Tensor, page_size: int, block_n: int
) -> bool:
    """Whether the Hopper kernel can run here on these tensors, with tiles of `block_n` tokens."""
    return (
        q_latent.is_cuda
        and torch.cuda.get_device_capability(q_latent.device) == (9, 0)
        and q_latent.dtype in (torch.bfloat16, torch.float16)
        and latent_cache.shape[1] > 0
        and tma_possible([latent_cache, rope_cache], page_size, block_n)
        and out.data_ptr() % 16 == 0
        and all(stride % 4 == 0 for stride in out.stride()[:3])
    )


def _launch_triton(
    q_latent, q_rope, latent_cache, rope_cache, visible, block_table, softmax_scale, num_splits, softcap, window, out, lse,
    processors, config,
):  # fmt: skip
    """Launch the Triton kernels."""
    from .decode_kernels import mla_decode_fwd_kernel_combine, mla_decode_fwd_kernel_split

    batch, tokens, heads, rank = q_latent.shape
    rope_dim = q_rope.shape[3]
    r0, r1 = rank_chunks(rank)
    rows = tokens * heads
    page_size = 0 if block_table is None else latent_cache.shape[1]
    slots = batch * num_splits if num_splits > 1 else 0
    part = torch.empty(slots, rows, rank, dtype=torch.float32, device=out.device)
    part_lse = torch.empty(slots, rows, dtype=torch.float32, device=out.device)
    # The look-up of a page is a stage of its own in the pipeline: with one more, as many tiles stay in flight.
    stages = config.stages + (1 if page_size and config.stages > 1 else 0)
    options = {"num_warps": config.warps, "num_stages": stages}
    if config.registers:
        options["maxnreg"] = config.registers
    if config.pdl:
        options["launch_pdl"] = True
    mla_decode_fwd_kernel_split[(-(-rows // config.block_m), batch * num_splits)](
        q_latent, q_rope, latent_cache, rope_cache, visible.lengths, visible.starts, visible.holes, visible.mask, visible.shown,
        visible.lengths if block_table is None else block_table, out, lse, part, part_lse,
        softmax_scale * LOG2E, softcap, window, tokens, heads,
        *q_latent.stride()[:3], *q_rope.stride()[:3], latent_cache.stride(0), rope_cache.stride(0),
        0 if block_table is None else block_table.stride(0), *out.stride()[:3],
        *visible.mask.stride()[:2], visible.shown.stride(0),
        # Between tokens: a model has one, and known in advance it spares a register for every row that a thread loads.
        stride_cn=latent_cache.stride(1), stride_kn=rope_cache.stride(1),
        rank=rank, rope_dim=rope_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, R0=r0, R1=r1,
        ROPE=max(power_of_two(rope_dim), 16) if rope_dim else 0, PAGE=page_size, SPLITS=num_splits,
        MASK=visible.masked, WINDOW=window > 0, SOFTCAP=softcap > 0,
        PRECISION="ieee" if q_latent.dtype == torch.float32 else "tf32", PDL=config.pdl, STAGES=stages, **options,
    )  # fmt: skip
    if num_splits == 1:
        return
    # Few rows: shorter pieces of the rank, so that enough programs fetch the parts.
    rank_chunk = min(power_of_two(rank), 128 if batch * rows * 4 <= processors * 8 else 512)
    parts = power_of_two(num_splits)
    mla_decode_fwd_kernel_combine[(batch * rows, -(-rank // rank_chunk))](
        part, part_lse, visible.lengths, visible.starts, out, lse, window, tokens, heads, rank, *out.stride()[:3],
        BLOCK_N=config.block_n, RANK_CHUNK=rank_chunk, PARTS=parts, PART_CHUNK=min(8192 // rank_chunk, parts),
        SPLITS=num_splits, MASK=visible.masked, WINDOW=window > 0, PDL=config.pdl, num_warps=4,
        **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip


def _launch_hopper(arguments: tuple, workers: int, config: DecodeConfig) -> bool:
    """Launch the CUDA kernels; false, and a warning once, where they cannot be compiled or loaded."""
    global _refused
    if _refused:
        return False
    from .hopper import hopper_launch
    from .nvrtc import KernelUnavailableError

    try:
        hopper_launch(*arguments, workers, config)
    except KernelUnavailableError as error:
        _refused = True
        warnings.warn(f"mla_attention: the CUDA kernels for Hopper do not serve here: {error}", stacklevel=2)
        return False
    return True


def launch_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float,
    num_splits: int,
    softcap: float,
    window: int,
    out: Tensor,
    lse: Tensor,
    config: DecodeConfig | None = None,
    mask: Tensor | None = None,
    extent: Tensor | None = None,
) -> None:
    """Fill `out` (B, T, H, r) and `lse` (B, H, T). `num_splits` 0 is chosen here; `window` 0 is none.

    With a mask (B, T, S), boolean, `extent` (3, B) is what `mask_extent` makes of it, and lengths are taken from there.
    Reads nothing back from the device, so that it can be captured in a CUDA graph.
    """
    batch, tokens, heads, rank = q_latent.shape
    rope_dim = q_rope.shape[3]
    rows = tokens * heads
    if batch == 0 or rows == 0:
        return
    processors, shared_limit, card = device_limits(q_latent.device)
    page_size = 0 if block_table is None else latent_cache.shape[1]
    if config is None and os.environ.get(HOPPER) != "0":
        config = hopper_config(rank, rope_dim, shared_limit)
    visible = Visible(cache_seqlens, mask, extent)
    inputs = (q_latent, q_rope, latent_cache, rope_cache, visible, block_table, softmax_scale)
    outputs = (softcap, window, out, lse)
    if config and config.hopper:
        workers = max(processors // -(-rows // config.block_m), 1)
        parts = num_splits
        if not (parts or page_size or visible.masked):  # pages, and masks of left padding, speak for different lengths
            parts = hopper_parts(workers, batch, latent_cache.shape[1])
        possible = hopper_possible(q_latent, latent_cache, rope_cache, out, page_size, config.block_n)
        if possible and _launch_hopper((*inputs, parts, *outputs), workers, config):
            return
        config = None
    config = config or default_config(rank, rope_dim, rows, q_latent.dtype, shared_limit, card)
    if not num_splits:
        capacity = latent_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        row_blocks = -(-rows // config.block_m)
        num_splits = choose_splits(config, processors, batch * row_blocks, capacity, bool(page_size))
    _launch_triton(*inputs, num_splits, *outputs, processors, config)
