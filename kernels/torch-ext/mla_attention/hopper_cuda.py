"""Launch of the CUDA kernel for Hopper: its source for given sizes, and its arguments."""

import ctypes
import functools
from pathlib import Path

import torch

from .nvrtc import Kernel, TensorMap, cached_cubin, matrix_map

LOG2E = 1.4426950408889634
ROWS = 64


class Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("lengths", "starts", "holes", "block_table", "mask", "out", "lse", "part", "part_lse")),
        *((name, ctypes.c_int64) for name in ("stride_tb", "stride_ob", "stride_ot", "stride_oh", "stride_mb", "stride_mt")),
        *((name, ctypes.c_float) for name in ("scale_log2", "softcap")),
        *((name, ctypes.c_int) for name in ("window", "batch", "tokens", "heads", "workers", "min_tiles", "splits", "c_rows", "k_rows")),
    ]  # fmt: skip


def _instruction(n: int, dtype: str, a_in_registers: bool) -> str:
    """A function that issues one matrix product of 64 rows, n columns and 16 in between, into d[at ..]."""
    count = n // 2
    numbers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[at + {i}])' for i in range(count))
    name = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} {{{numbers}}}"
    if a_in_registers:
        head = f"mma_rs_{n}(float (&d)[S], int at, u32 a0, u32 a1, u32 a2, u32 a3, u64 b)"
        text = (
            f"{{\\n.reg .pred p;\\nsetp.eq.u32 p, 0, 0;\\n"
            f"{name}, {{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, p, 1, 1, 1;\\n}}"
        )
        inputs = '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)'
    else:
        head = f"mma_ss_{n}(float (&d)[S], int at, u64 a, u64 b, int more)"
        text = (
            f"{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n{name}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}"
        )
        inputs = '"l"(a), "l"(b), "r"(more)'
    return f'template <int S> __device__ __forceinline__ void {head} {{\n    asm volatile("{text}" : {outputs} : {inputs});\n}}\n'


def _side(name: str, columns: int) -> tuple[set[int], str]:
    """Widths of instructions, at most 256 columns each, and a function that issues them for all of a warpgroup's columns."""
    pieces = [(at, min(columns - at, 256)) for at in range(0, columns, 256)]
    body = "".join(
        f"    mma_rs_{n}(d, {at // 2}, a0, a1, a2, a3, further(values, {at // 64} * C_CHUNK));\n" for at, n in pieces
    )
    return {n for _, n in pieces}, (
        f"template <int S> __device__ __forceinline__ void mma_{name}(float (&d)[S], u32 a0, u32 a1, u32 a2, u32 a3, u64 values) {{\n"
        f"{body}}}\n"
    )


def source(constants: dict[str, int]) -> str:
    """CUDA C++ for these constants."""
    rank, block_n = constants["RANK"], constants["BLOCK_N"]
    dtype = "bf16" if constants["BF16"] else "f16"
    chunks = -(-rank // 64)
    left = chunks // 2 * 64 if chunks > 1 else rank
    widths, functions = _side("left", left)
    if rank > left:
        more, right = _side("right", rank - left)
        widths, functions = widths | more, functions + right
    products = _instruction(block_n, dtype, False) + "".join(_instruction(n, dtype, True) for n in sorted(widths)) + functions
    products += (
        "template <int S> __device__ __forceinline__ void mma_scores(float (&d)[S], u64 a, u64 b, int more) "
        f"{{ mma_ss_{block_n}(d, 0, a, b, more); }}\n"
    )
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    text = (Path(__file__).parent / "hopper_decode.cu").read_text()
    return defines + text.replace("//MMA//", products)


def cuda_shared_memory(rank: int, rope_dim: int, block_n: int, stages: int) -> int:
    """Shared memory of a program, in bytes: queries, tiles, weights, factors, barriers; and room to align them."""
    columns = -(-rank // 64) + -(-rope_dim // 64)
    return columns * 128 * (ROWS + block_n * stages) + ROWS * block_n * 2 + ROWS * 4 + 16 * stages + 32 + 1024


@functools.cache
def _kernel(device: int, constants: tuple[tuple[str, int], ...]) -> Kernel:
    values = dict(constants)
    code = cached_cubin(source(values), ("--gpu-architecture=sm_90a", "--std=c++17"))
    shared = cuda_shared_memory(values["RANK"], values["ROPE"], values["BLOCK_N"], values["STAGES"])
    return Kernel(code, "mla_decode_hopper", shared, 288 if values["RANK"] > 64 else 160)


def cuda_launch(
    q_latent, q_rope, latent_cache, rope_cache, visible, block_table, softmax_scale, num_splits, softcap, window, out, lse,
    part, part_lse, workers, config,
):  # fmt: skip
    """Arguments as `decode_triton`; `workers` programs for every block of rows."""
    batch, tokens, heads, rank = q_latent.shape
    rope_dim = q_rope.shape[3]
    constants = {
        "RANK": rank, "ROPE": rope_dim, "BLOCK_N": config.block_n, "STAGES": config.stages,
        "BF16": int(q_latent.dtype == torch.bfloat16), "PAGE": 0 if block_table is None else latent_cache.shape[1],
        "MASK": int(visible.masked), "WINDOW": int(window > 0), "SOFTCAP": int(softcap > 0), "PDL": int(config.pdl),
    }  # fmt: skip
    kernel = _kernel(torch.cuda.current_device(), tuple(constants.items()))
    c_map, c_rows = matrix_map(latent_cache, config.block_n)
    q_map, _ = matrix_map(q_latent.reshape(1, -1, rank), ROWS)
    k_map, qr_map, k_rows = c_map, q_map, 0
    if rope_dim:
        k_map, k_rows = matrix_map(rope_cache, config.block_n)
        qr_map, _ = matrix_map(q_rope.reshape(1, -1, rope_dim), ROWS)
    stride_mb, stride_mt = visible.mask.stride()[:2]
    arguments = Arguments(
        visible.lengths.data_ptr(), visible.starts.data_ptr(), visible.holes.data_ptr(),
        0 if block_table is None else block_table.data_ptr(), visible.mask.data_ptr(), out.data_ptr(), lse.data_ptr(),
        part.data_ptr(), part_lse.data_ptr(), 0 if block_table is None else block_table.stride(0), *out.stride()[:3],
        stride_mb, stride_mt, softmax_scale * LOG2E, softcap, window, batch, tokens, heads, workers, config.min_tiles,
        num_splits, c_rows, k_rows,
    )  # fmt: skip
    kernel.launch((-(-tokens * heads // ROWS), workers), (c_map, k_map, q_map, qr_map, arguments), config.pdl)
