"""The kernels as PyTorch operators, so that torch.compile and CUDA graphs take them whole.

On CUDA they launch the kernels; on the CPU the reference computes in float32 (float64 for float64 inputs).
"""

import torch
from torch import Tensor

from ._namespace import add_op_namespace_prefix
from .naive import naive_decode, naive_write


def _cpu_precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op(add_op_namespace_prefix("decode"), mutates_args=("out", "lse"), device_types="cuda")
def decode(
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
    mask: Tensor | None,
    extent: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out` and `lse`; see `mla_decode`. `num_splits` 0 is chosen by the kernel, `window` 0 is none."""
    from .decode import launch_decode

    launch_decode(
        q_latent, q_rope, latent_cache, rope_cache, cache_seqlens, block_table, softmax_scale, num_splits, softcap,
        window, out, lse, mask=mask, extent=extent,
    )  # fmt: skip


@decode.register_kernel("cpu")
def _(
    q_latent, q_rope, latent_cache, rope_cache, cache_seqlens, block_table, softmax_scale, num_splits, softcap, window,
    mask, extent, out, lse,
):  # fmt: skip
    attended, natural = naive_decode(
        q_latent, q_rope, latent_cache, rope_cache, cache_seqlens, softmax_scale=softmax_scale,
        block_table=block_table, softcap=softcap, window=window or None, mask=mask,
        compute_dtype=_cpu_precision(q_latent),
    )  # fmt: skip
    out.copy_(attended)
    lse.copy_(natural)


@decode.register_fake
def _(
    q_latent, q_rope, latent_cache, rope_cache, cache_seqlens, block_table, softmax_scale, num_splits, softcap, window,
    mask, extent, out, lse,
):  # fmt: skip
    return None


@torch.library.custom_op(
    add_op_namespace_prefix("write"), mutates_args=("latent_cache", "rope_cache"), device_types="cuda"
)
def write(
    latent: Tensor,
    k_rope: Tensor,
    q_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    positions: Tensor,
    block_table: Tensor | None,
) -> Tensor:
    """Write the caches and return the rotated queries; see `mla_write`."""
    from .write import write_triton

    query = torch.empty_like(q_rope, memory_format=torch.contiguous_format)
    write_triton(latent, k_rope, q_rope, cos, sin, latent_cache, rope_cache, positions, block_table, query)
    return query


@write.register_kernel("cpu")
def _(latent, k_rope, q_rope, cos, sin, latent_cache, rope_cache, positions, block_table):
    return naive_write(
        latent, k_rope, q_rope, cos, sin, latent_cache, rope_cache, positions, block_table=block_table,
        compute_dtype=_cpu_precision(latent),
    )  # fmt: skip


@write.register_fake
def _(latent, k_rope, q_rope, cos, sin, latent_cache, rope_cache, positions, block_table):
    return torch.empty_like(q_rope, memory_format=torch.contiguous_format)
