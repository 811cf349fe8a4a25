"""Launch of the CUDA kernel for Hopper on packed rows."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from .hopper import LOG2E, Arguments
from .nvrtc import Kernel, cached_cubin, load_kernels
from .problem import DecodeProblem, SequenceMask
from .tuning import DecodeConfig, hopper_parts, hopper_workers

# Tokens of a tile, and threads of a program: two warpgroups that compute, one that loads.
TILE, THREADS = 64, 384


class PackedArguments(ctypes.Structure):
    """The structure `Packed` in hopper_packed_rows.cu: its fields, in its order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "q", "qr")),
        *((f"stride_{name}", ctypes.c_int64) for name in ("cb", "cn", "qb", "qt", "qh", "rb", "rt", "rh")),
    ]  # fmt: skip


def _instruction(name: str, columns: int, kind: str) -> str:
    """CUDA function that issues one product (64, 16) x (16, columns), added to d[at ..] where `more`."""
    count = columns // 2
    numbers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[at + {i}])' for i in range(count))
    text = (
        f"setp.ne.b32 p, %{count + 5}, 0;\\nwgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{numbers}}}, "
        f"{{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, p, 1, 1, 0;"
    )
    head = f"{name}(float (&d)[S], int at, u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int more)"
    inputs = '"r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(more)'
    body = f'asm volatile("{{\\n.reg .pred p;\\n{text}\\n}}" : {outputs} : {inputs});'
    return f"template <int S> __device__ __forceinline__ void {head} {{\n    {body}\n}}\n"


def source(constants: dict[str, int]) -> str:
    """CUDA C++ source for these constants: definitions, common part, matrix instructions, attention, combination."""
    columns = constants["QUERIES"]
    products = "".join(_instruction(f"mma_{kind}", columns, kind) for kind in ("f16", "bf16"))
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    here = Path(__file__).parent
    parts = ("common", "packed_rows", "packed_products", "packed", "combine")
    common, *others = ((here / f"hopper_{part}.cu").read_text() for part in parts)
    return "\n".join((defines, common, products, *others))


def blocks(channels: int, nibbles: bool) -> int:
    """Blocks of 64 channels into which a section is padded: whole units of four, and a rest of one, two or four."""
    count = -(-channels // 64) if not nibbles else -(-(channels // 2) // 32)
    return count + (count % 4 == 3)


def columns_of(rows: int, padded: int) -> int:
    """Query rows of a program: as many as leave room for the accumulators in the registers of a warpgroup."""
    if rows <= 16:
        return 16
    return 32 if rows <= 32 or padded > 4 else 64


def shared_memory(constants: dict[str, int]) -> int:
    """Shared memory of a program, in bytes: queries and weights, tiles, state, barriers and alignment.

    At the end of a sequence, a unit of accumulators, of at most 4 blocks, takes the place of queries and weights.
    """
    columns, steps = constants["QUERIES"], (constants["RANK"] + constants["ROPE"]) // 16
    wide = constants["WIDE"]
    padded = blocks(wide, False) + blocks(constants["RANK"] - wide, True)
    operands = max((-(-steps // 4) + 4) * columns * 128, min(padded, 4) * columns * 256)
    tiles = TILE * constants["STRIDE"] * constants["STAGES"]
    return operands + tiles + 16 + 19 * columns * 4 + 16 * constants["STAGES"] + 1024


def _padded(problem: DecodeProblem) -> int:
    """Blocks of 64 channels of the accumulators."""
    wide = problem.row_format.wide
    return blocks(wide, False) + blocks(problem.rank - wide, True)


def packed_hopper_config(problem: DecodeProblem, shared_limit: int = 227 * 1024) -> DecodeConfig | None:
    """Launch parameters of the CUDA kernel, with as many stages as fit; None where it does not serve the sizes."""
    form, rank = problem.row_format, problem.rank
    narrow = rank - form.wide
    if _padded(problem) > 8 or form.wide % 16 or narrow % 32 or form.group % 16 or 0 < form.group < 32:
        return None
    if form.group and any(
        size % 64 == 48 for size in (form.wide, narrow // 2)
    ):  # a lane's 12 channels would cross groups
        return None
    columns = columns_of(problem.rows, _padded(problem))
    for stages in (8, 6, 4, 2):  # a stage belongs to one warpgroup
        config = DecodeConfig(columns, TILE, stages=stages, pdl=True, hopper=True, min_tiles=2)
        if shared_memory(constants_of(problem, config)) <= shared_limit:
            return config
    return None


def constants_of(problem: DecodeProblem, config: DecodeConfig) -> dict[str, int]:
    """Preprocessor constants of the kernel's source."""
    form, at, page = problem.row_format, problem.layout, problem.page_size
    # Rows an odd multiple of 16 or of 32 bytes apart are read without bank conflicts. Others are padded, so copied one by one.
    padding = 16 if at.row_bytes % 64 == 0 else 0
    together = not padding and problem.latent_cache.stride(1) == at.row_bytes
    piece = 1 if not together else TILE if page % TILE == 0 else page if TILE % page == 0 else 1
    return {
        "PACKED": 1, "RANK": problem.rank, "ROPE": problem.rope_dim, "WIDE": form.wide, "FLOAT8": int(form.float8),
        "GROUP": form.group, "ROPE8": int(form.rope_float8), "CODES4": at.codes4, "ROPE_AT": at.rope, "SCALES": at.scales,
        "GROUPS8": at.groups8, "ALL_GROUPS": at.groups, "ROW_BYTES": at.row_bytes,
        "STRIDE": at.row_bytes + padding, "PIECE": piece, "BLOCK_N": TILE, "BF16": 1, "PAGE": page,
        "MASK": int(problem.mask is not None), "WINDOW": int(problem.window > 0), "SOFTCAP": int(problem.softcap > 0),
        "PDL": int(config.pdl), "QUERIES": config.block_m, "STAGES": config.stages,
    }  # fmt: skip


def packed_hopper_possible(problem: DecodeProblem) -> bool:
    """Whether the CUDA kernel can serve a problem of sizes that it serves."""
    query, out = problem.q_latent, problem.out
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device) == (9, 0)
        and query.dtype == torch.bfloat16
        and problem.latent_cache.shape[1] > 0
        and out.data_ptr() % 16 == 0
        and all(stride % 4 == 0 for stride in out.stride()[:3])
    )


@functools.cache
def _kernels(device: int, constants: tuple[tuple[str, int], ...]) -> tuple[Kernel, ...]:
    """The kernels that attend, combine row by row, and combine many parts of few rows."""
    values = dict(constants)
    code = cached_cubin(source(values), ("--gpu-architecture=sm_90a", "--std=c++17"))
    return load_kernels(
        code,
        ("mla_decode_packed_hopper", THREADS, shared_memory(values)),
        ("mla_combine_rows", 256, 0),
        ("mla_combine_parts", 256, 0),
    )


def launch_packed_hopper(problem: DecodeProblem, seen: SequenceMask, processors: int, config: DecodeConfig) -> None:
    """Attend to packed rows and combine.

    Args:
        problem: checked, in bfloat16 and with a format.
        seen: its mask.
        processors: multiprocessors of the device.
        config: query rows of a program, stages, fewest tiles of a program.

    Raises:
        KernelUnavailableError: the kernels cannot be compiled or loaded.
    """
    q, qr, rows, table, out = (
        problem.q_latent, problem.q_rope, problem.latent_cache, problem.block_table, problem.out,
    )  # fmt: skip
    q, qr = (
        x if x.data_ptr() % 4 == 0 and all(n % 2 == 0 for n in x.stride()[:3]) else x.contiguous() for x in (q, qr)
    )
    batch, tokens, heads, rank = q.shape
    count = tokens * heads
    row_blocks = -(-count // config.block_m)
    workers, splits = hopper_workers(processors, row_blocks, batch, problem.capacity), problem.num_splits
    if not (splits or problem.page_size or problem.mask is not None):
        splits = hopper_parts(workers, batch, rows.shape[1])
    workers = batch * splits if splits else workers
    slots = workers if splits else 2 * workers
    part = torch.empty(slots, count, rank, dtype=torch.float32, device=out.device)
    part_lse = torch.empty(slots, count, dtype=torch.float32, device=out.device)
    attend, combine_rows, combine_parts = _kernels(q.device.index or 0, tuple(constants_of(problem, config).items()))
    arguments = Arguments(
        seen.lengths.data_ptr(), seen.starts.data_ptr(), seen.has_gaps.data_ptr(), 0 if table is None else table.data_ptr(),
        seen.mask.data_ptr(), seen.shown.data_ptr(), out.data_ptr(), problem.lse.data_ptr(), part.data_ptr(),
        part_lse.data_ptr(), 0 if table is None else table.stride(0), *out.stride()[:3], *seen.mask.stride()[:2],
        seen.shown.stride(0), problem.softmax_scale * LOG2E, problem.softcap, problem.window, batch, tokens, heads,
        workers, config.min_tiles, splits, 0, 0,
    )  # fmt: skip
    packed = PackedArguments(
        rows.data_ptr(), q.data_ptr(), qr.data_ptr(), *rows.stride()[:2], *q.stride()[:3], *qr.stride()[:3]
    )
    attend.launch((row_blocks, workers, 1), (packed, arguments), config.pdl)
    if (splits or workers / batch) > 6:
        combine_parts.launch((batch, count, -(-rank // 128)), (arguments,), config.pdl)
    else:
        combine_rows.launch((batch, -(-count // 8), 1), (arguments,), config.pdl)
