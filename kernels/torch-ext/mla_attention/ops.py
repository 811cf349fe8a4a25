"""The kernels as PyTorch operators, so that torch.compile and CUDA graphs treat each as one operation.

On CUDA an operator launches kernels; on the CPU the reference computes in float32 (in float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._namespace import add_op_namespace_prefix
from .naive import naive_decode, naive_write
from .problem import DecodeProblem

# The fields of DecodeProblem in their order. The operator fills `out` and `lse`; `num_splits` 0 is chosen by the launcher,
# `window` 0 is none, and `extent`, the name in graphs that were exported before, is `mask_bounds`.
DECODE_SCHEMA = (
    "(Tensor q_latent, Tensor q_rope, Tensor latent_cache, Tensor rope_cache, Tensor? cache_seqlens, Tensor? block_table, "
    "float softmax_scale, SymInt num_splits, float softcap, SymInt window, Tensor? mask, Tensor? extent, "
    "Tensor(a12!) out, Tensor(a13!) lse) -> ()"
)
WRITE_SCHEMA = (
    "(Tensor latent, Tensor k_rope, Tensor q_rope, Tensor cos, Tensor sin, Tensor(a5!) latent_cache, Tensor(a6!) rope_cache, "
    "Tensor positions, Tensor? block_table) -> Tensor"
)


def _cpu_precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op(
    add_op_namespace_prefix("decode"), mutates_args=("out", "lse"), device_types="cuda", schema=DECODE_SCHEMA
)
def decode(*problem: Tensor | float | None) -> None:
    """Launch the kernels of a decode call, the fields of a checked `DecodeProblem`."""
    from .decode import launch_decode

    launch_decode(DecodeProblem(*problem))


@decode.register_kernel("cpu")
def _(*arguments: Tensor | float | None) -> None:
    problem = DecodeProblem(*arguments)
    attended, natural = naive_decode(
        problem.q_latent, problem.q_rope, problem.latent_cache, problem.rope_cache, problem.cache_seqlens,
        softmax_scale=problem.softmax_scale, block_table=problem.block_table, softcap=problem.softcap,
        window=problem.window or None, mask=problem.mask, compute_dtype=_cpu_precision(problem.q_latent),
    )  # fmt: skip
    problem.out.copy_(attended)
    problem.lse.copy_(natural)


@decode.register_fake
def _(*arguments: Tensor | float | None) -> None:
    return None


@torch.library.custom_op(
    add_op_namespace_prefix("write"),
    mutates_args=("latent_cache", "rope_cache"),
    device_types="cuda",
    schema=WRITE_SCHEMA,
)
def write(*arguments: Tensor | None) -> Tensor:
    """Launch the kernel of a write call, the arguments of `mla_write`; return the rotated queries."""
    from .write import write_triton

    query = torch.empty_like(arguments[2], memory_format=torch.contiguous_format)
    write_triton(*arguments, query)
    return query


@write.register_kernel("cpu")
def _(*arguments: Tensor | None) -> Tensor:
    *inputs, block_table = arguments
    return naive_write(*inputs, block_table=block_table, compute_dtype=_cpu_precision(arguments[0]))


@write.register_fake
def _(*arguments: Tensor | None) -> Tensor:
    return torch.empty_like(arguments[2], memory_format=torch.contiguous_format)
