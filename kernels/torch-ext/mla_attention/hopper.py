"""Launch of the CUDA kernels for Hopper: their source for given sizes, and their arguments."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from .nvrtc import Kernel, cached_cubin, load_kernels, matrix_map
from .problem import DecodeProblem, SequenceMask
from .tuning import DecodeConfig, hopper_groups, hopper_shared_memory

LOG2E = 1.4426950408889634
ROWS = 64


class Arguments(ctypes.Structure):
    """The structure of the same name in hopper_common.cu: its fields, in its order; `holes` are `has_gaps`."""

    _fields_ = [
        (name, kind)
        for kind, names in (
            (
                ctypes.c_void_p,
                ("lengths", "starts", "holes", "block_table", "mask", "shown", "out", "lse", "part", "part_lse"),
            ),
            (
                ctypes.c_int64,
                ("stride_tb", "stride_ob", "stride_ot", "stride_oh", "stride_mb", "stride_mt", "stride_sb"),
            ),
            (ctypes.c_float, ("scale_log2", "softcap")),
            (
                ctypes.c_int,
                ("window", "batch", "tokens", "heads", "workers", "min_tiles", "splits", "c_rows", "k_rows"),
            ),
        )
        for name in names
    ]


def _instruction(n: int, dtype: str, a_in_registers: bool) -> str:
    """CUDA function that issues one product (64, 16) x (16, n) and adds it to d[at ..]."""
    count = n // 2
    numbers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[at + {i}])' for i in range(count))
    name = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} {{{numbers}}}"
    if a_in_registers:
        head = f"mma_rs_{n}(float (&d)[S], int at, u32 a0, u32 a1, u32 a2, u32 a3, u64 b)"
        operands = f"{{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, p, 1, 1, 1"
        text = f"setp.eq.u32 p, 0, 0;\\n{name}, {operands};"
        inputs = '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)'
    else:
        head = f"mma_ss_{n}(float (&d)[S], int at, u64 a, u64 b, int more)"
        text = f"setp.ne.b32 p, %{count + 2}, 0;\\n{name}, %{count}, %{count + 1}, p, 1, 1, 0, 0;"
        inputs = '"l"(a), "l"(b), "r"(more)'
    body = f'asm volatile("{{\\n.reg .pred p;\\n{text}\\n}}" : {outputs} : {inputs});'
    return f"template <int S> __device__ __forceinline__ void {head} {{\n    {body}\n}}\n"


def _warpgroup_products(name: str, columns: int) -> tuple[set[int], str]:
    """Widths of the instructions for a warpgroup's columns, at most 256 each, and a CUDA function that issues them."""
    pieces = [(at, min(columns - at, 256)) for at in range(0, columns, 256)]
    calls = "".join(
        f"    mma_rs_{n}(d, {at // 2}, a0, a1, a2, a3, further(values, {at // 64} * C_CHUNK));\n" for at, n in pieces
    )
    head = f"void mma_{name}(float (&d)[S], u32 a0, u32 a1, u32 a2, u32 a3, u64 values)"
    return {n for _, n in pieces}, f"template <int S> __device__ __forceinline__ {head} {{\n{calls}}}\n"


def left_columns(rank: int) -> int:
    """Columns of the output that the first warpgroup computes: all, or half of the chunks of 64 where two share the rank."""
    return rank if rank <= 256 else -(-rank // 64) // 2 * 64


def source(constants: dict[str, int]) -> str:
    """CUDA C++ source for these constants: definitions, common part, matrix instructions, attention, combination."""
    rank, block_n = constants["RANK"], constants["BLOCK_N"]
    dtype = "bf16" if constants["BF16"] else "f16"
    left = left_columns(rank)
    widths, sides = _warpgroup_products("left", left)
    if rank > left:
        more, right = _warpgroup_products("right", rank - left)
        widths, sides = widths | more, sides + right
    scores = (
        "template <int S> __device__ __forceinline__ void mma_scores(float (&d)[S], u64 a, u64 b, int more) "
        f"{{ mma_ss_{block_n}(d, 0, a, b, more); }}\n"
    )
    products = "".join(_instruction(n, dtype, True) for n in sorted(widths))
    products = _instruction(block_n, dtype, False) + products + scores + sides
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    here = Path(__file__).parent
    common, attend, combine = ((here / f"hopper_{part}.cu").read_text() for part in ("common", "decode", "combine"))
    return "\n".join((defines, common, products, attend, combine))


@functools.cache
def _kernels(device: int, constants: tuple[tuple[str, int], ...]) -> tuple[Kernel, ...]:
    """The kernels that attend, combine row by row, and combine many parts of few rows."""
    values = dict(constants)
    code = cached_cubin(source(values), ("--gpu-architecture=sm_90a", "--std=c++17"))
    shared = hopper_shared_memory(values["RANK"], values["ROPE"], values["BLOCK_N"], values["STAGES"])
    return load_kernels(
        code,
        ("mla_decode_hopper", (hopper_groups(values["RANK"]) + 1) * 128, shared),
        ("mla_combine_rows", 256, 0),
        ("mla_combine_parts", 256, 0),
    )


def _rows_of(query: Tensor) -> Tensor:
    """Queries (B, T, H, d) as (1, B * T * H, d), 16-byte aligned."""
    rows = query.reshape(1, -1, query.shape[3])
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def _constants(problem: DecodeProblem, config: DecodeConfig) -> dict[str, int]:
    """Preprocessor constants of the kernels' source."""
    return {
        "RANK": problem.rank, "ROPE": problem.rope_dim, "BLOCK_N": config.block_n, "STAGES": config.stages,
        "BF16": int(problem.q_latent.dtype == torch.bfloat16), "PAGE": problem.page_size,
        "MASK": int(problem.mask is not None), "WINDOW": int(problem.window > 0), "SOFTCAP": int(problem.softcap > 0),
        "PDL": int(config.pdl),
    }  # fmt: skip


def hopper_launch(
    problem: DecodeProblem, seen: SequenceMask, num_splits: int, workers: int, config: DecodeConfig
) -> None:
    """Attend and combine.

    Args:
        problem: checked tensors and options.
        seen: its mask.
        num_splits: parts into which every sequence is cut, one program each; 0 distributes all tiles of all sequences evenly
            over the workers.
        workers: programs for every block of 64 rows, where `num_splits` is 0.
        config: tile size and pipeline.

    Raises:
        KernelUnavailableError: the kernels cannot be compiled or loaded.
    """
    q_latent, block_table, out = problem.q_latent, problem.block_table, problem.out
    batch, tokens, heads, rank = q_latent.shape
    rows, page_size = tokens * heads, problem.page_size
    workers = batch * num_splits if num_splits else workers
    slots = workers if num_splits else 2 * workers
    part = torch.empty(slots, rows, rank, dtype=torch.float32, device=out.device)
    part_lse = torch.empty(slots, rows, dtype=torch.float32, device=out.device)
    attend, combine_rows, combine_parts = _kernels(
        q_latent.device.index or 0, tuple(_constants(problem, config).items())
    )
    box = min(page_size or config.block_n, config.block_n)
    c_map, c_rows = matrix_map(problem.latent_cache, box)
    q_map, _ = matrix_map(_rows_of(q_latent), ROWS)
    k_map, qr_map, k_rows = c_map, q_map, 0
    if problem.rope_dim:
        k_map, k_rows = matrix_map(problem.rope_cache, box)
        qr_map, _ = matrix_map(_rows_of(problem.q_rope), ROWS)
    arguments = Arguments(
        seen.lengths.data_ptr(), seen.starts.data_ptr(), seen.has_gaps.data_ptr(),
        0 if block_table is None else block_table.data_ptr(), seen.mask.data_ptr(), seen.shown.data_ptr(),
        out.data_ptr(), problem.lse.data_ptr(), part.data_ptr(), part_lse.data_ptr(),
        0 if block_table is None else block_table.stride(0), *out.stride()[:3], *seen.mask.stride()[:2],
        seen.shown.stride(0), problem.softmax_scale * LOG2E, problem.softcap, problem.window, batch, tokens, heads,
        workers, config.min_tiles, num_splits, c_rows, k_rows,
    )  # fmt: skip
    attend.launch((-(-rows // ROWS), workers, 1), (c_map, k_map, q_map, qr_map, arguments), config.pdl)
    if (num_splits or workers / batch) > 6:
        combine_parts.launch((batch, rows, -(-rank // 128)), (arguments,), config.pdl)
    else:
        combine_rows.launch((batch, -(-rows // 8), 1), (arguments,), config.pdl)
