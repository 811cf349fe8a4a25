"""The kernels as PyTorch operators, so that torch.compile and CUDA graphs treat each as one operation.

On CUDA an operator launches kernels; on the CPU the reference computes in float32 (in float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._namespace import add_op_namespace_prefix
from .naive import naive_decode, naive_write
from .problem import DecodeProblem
from .rows import RowFormat

# The fields of DecodeProblem in their order. The operator fills `out` and `lse`; `num_splits` 0 is chosen by the launcher,
# `window` 0 is none, and `extent`, the name in graphs that were exported before, is `mask_bounds`.
DECODE_SCHEMA = (
    "(Tensor q_latent, Tensor q_rope, Tensor latent_cache, Tensor? rope_cache, Tensor? cache_seqlens, Tensor? block_table, "
    "float softmax_scale, SymInt num_splits, float softcap, SymInt window, Tensor? mask, Tensor? extent, "
    "Tensor(a12!) out, Tensor(a13!) lse, int[]? row_format=None) -> ()"
)
WRITE_SCHEMA = (
    "(Tensor latent, Tensor k_rope, Tensor q_rope, Tensor cos, Tensor sin, Tensor(a5!) latent_cache, Tensor(a6!)? rope_cache, "
    "Tensor positions, Tensor? block_table, int[]? row_format=None, Tensor? key_basis=None, SymInt query_room=0) -> Tensor"
)


def _cpu_precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_problem(*fields: Any) -> DecodeProblem:
    """The problem of an operator's arguments, which hold the format as a list of numbers."""
    problem = DecodeProblem(*fields)
    return problem if problem.row_format is None else problem._replace(row_format=RowFormat(*problem.row_format))


@torch.library.custom_op(
    add_op_namespace_prefix("decode"), mutates_args=("out", "lse"), device_types="cuda", schema=DECODE_SCHEMA
)
def decode(*problem: Any) -> None:
    """Launch the kernels of a decode call, the fields of a checked `DecodeProblem`."""
    from .decode import launch_decode

    launch_decode(as_problem(*problem))


@decode.register_kernel("cpu")
def _(*arguments: Any) -> None:
    problem = as_problem(*arguments)
    attended, natural = naive_decode(
        problem.q_latent, problem.q_rope, problem.latent_cache, problem.rope_cache, problem.cache_seqlens,
        softmax_scale=problem.softmax_scale, block_table=problem.block_table, softcap=problem.softcap,
        window=problem.window or None, mask=problem.mask, row_format=problem.row_format,
        compute_dtype=_cpu_precision(problem.q_latent),
    )  # fmt: skip
    problem.out.copy_(attended)
    problem.lse.copy_(natural)


@decode.register_fake
def _(*arguments: Any) -> None:
    return None


@torch.library.custom_op(
    add_op_namespace_prefix("write"),
    mutates_args=("latent_cache", "rope_cache"),
    device_types="cuda",
    schema=WRITE_SCHEMA,
)
def write(*arguments: Any) -> Tensor:
    """Launch the kernel of a write call, the arguments of `mla_write`; return the rotated queries."""
    from .write import write_triton

    query = _queries_for(arguments)
    write_triton(*arguments[:9], query[..., _room(arguments) :], _row_format(arguments), _key_basis(arguments))
    return query


def _row_format(arguments: tuple[Any, ...]) -> RowFormat | None:
    """The format among the arguments of a write call, which graphs of earlier versions do not have."""
    return RowFormat(*arguments[9]) if len(arguments) > 9 and arguments[9] is not None else None


def _key_basis(arguments: tuple[Any, ...]) -> Tensor | None:
    """The basis of the keys among the arguments of a write call, likewise."""
    return arguments[10] if len(arguments) > 10 else None


def _room(arguments: tuple[Any, ...]) -> int:
    """Numbers before each rotated query that a write call leaves to its caller, likewise."""
    return arguments[11] if len(arguments) > 11 else 0


def _queries_for(arguments: tuple[Any, ...]) -> Tensor:
    """Memory for the rotated queries of a write call, and the room before them."""
    q_rope = arguments[2]
    return q_rope.new_empty(*q_rope.shape[:-1], _room(arguments) + q_rope.shape[-1])


@write.register_kernel("cpu")
def _(*arguments: Any) -> Tensor:
    return naive_write(
        *arguments[:8], block_table=arguments[8], row_format=_row_format(arguments), key_basis=_key_basis(arguments),
        query_room=_room(arguments), compute_dtype=_cpu_precision(arguments[0]),
    )  # fmt: skip


@write.register_fake
def _(*arguments: Any) -> Tensor:
    return _queries_for(arguments)
