"""Shared by all tasks: log, timing, inputs, and the speed of the card."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mla_attention.decode import launch_decode
from mla_attention.problem import DecodeProblem
from mla_attention.rows import RowFormat, naive_pack, naive_unpack
from mla_attention.tuning import DecodeConfig

DISTINCT_BYTES = 256e6
START = time.monotonic()

# Rank, rope dimension, heads, batch, length, page size (0: contiguous), whether lengths differ, and the format of packed rows.
Shape = tuple[int, int, int, int, int, int, bool, RowFormat | None]
# Queries, rotary queries, latent caches and rope caches of all slices, lengths, block table, out, lse, and the format; packed
# rows are in the place of latents, and there are no rope caches.
Slices = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor, RowFormat | None]


def half(device: str) -> torch.dtype:
    """bfloat16, or float16 in Triton's interpreter, which multiplies bit patterns of bfloat16 as integers."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def row_format(name: str, rank: int) -> RowFormat | None:
    """Format of a name: bf16 (None), or fp8, int8, int4 or mixed, with /G for groups of G channels and +8 for a key in e4m3.

    "mixed" has 8 bits for the first quarter of the channels.
    """
    kind, _, rest = name.partition("/")
    group, _, key = rest.partition("+") if rest else (0, None, kind.partition("+")[2])
    kind = kind.partition("+")[0]
    if kind == "bf16":
        return None
    wide = {"fp8": rank, "int8": rank, "int4": 0, "mixed": rank // 64 * 16}[kind]
    return RowFormat(wide, int(kind == "fp8"), int(group or 0), int(key == "8"))


def left(arguments: argparse.Namespace) -> float:
    """Seconds left of `--seconds`."""
    return arguments.seconds - (time.monotonic() - START)


def device_name(device: str) -> str:
    """The device and the versions of what runs on it."""
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    return f"{name}, torch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}"


class Log:
    """A file of JSON lines, each written at once, with a short form of each on the terminal."""

    def __init__(self, folder: Path, name: str):
        """Create `name`.jsonl in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"{name}.jsonl").open("w")

    def add(self, text: str | None = None, **row: Any) -> None:
        """Write `row`, and print `text` with the elapsed seconds."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if text:
            print(f"[{time.monotonic() - START:5.0f}s] {text}", flush=True)


def time_calls(calls: Sequence[Callable[[], object]], device: str, replays: int = 9) -> float:
    """Median microseconds of a call, from replays of one CUDA graph that runs all `calls` one after another."""
    if device == "cpu":  # a dry run in the interpreter; its time means nothing
        start = time.perf_counter()
        calls[0]()
        return (time.perf_counter() - start) * 1e6
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start = time.perf_counter()
    while True:  # until the clocks have risen
        graph.replay()
        torch.cuda.synchronize()
        if time.perf_counter() - start > 0.015:
            break
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


@triton.jit
def read_kernel(x, total, BLOCK: tl.constexpr, PIECES: tl.constexpr):  # noqa: N803
    first = tl.program_id(0).to(tl.int64) * BLOCK * PIECES
    seen = tl.zeros([BLOCK], tl.float32)
    for piece in range(PIECES):
        seen += tl.load(x + first + piece * BLOCK + tl.arange(0, BLOCK))
    # The sum is stored, or the compiler would leave out the loads.
    tl.store(total + tl.program_id(0), tl.sum(seen, 0))


def read_bandwidth(device: str) -> float:
    """GB/s of a kernel that only reads."""
    block, pieces = 4096, 32
    programs = (4 << 30) // (block * pieces * 4) if device == "cuda" else 2
    x = torch.ones(programs * block * pieces, device=device)
    total = torch.empty(programs, device=device)
    us = time_calls([lambda: read_kernel[(programs,)](x, total, block, pieces, num_warps=8)], device)
    return x.numel() * 4 / us / 1e3


def matmul_rate(device: str) -> float:
    """TFLOP/s of torch.mm in bfloat16."""
    n = 8192 if device == "cuda" else 64
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * n**3 / time_calls([lambda: torch.mm(a, b)] * 4, device) / 1e6


def ceilings(device: str) -> tuple[float, float, str]:
    """Read bandwidth in GB/s and matrix rate in TFLOP/s of the card at this moment, and its name."""
    forget_inputs()
    result = read_bandwidth(device), matmul_rate(device), device_name(device)
    forget_inputs()
    return result


def make_slices(
    rank: int, rope_dim: int, heads: int, batch: int, length: int, page_size: int, ragged: bool, form: RowFormat | None,
    device: str,
) -> tuple[Slices, int, int]:  # fmt: skip
    """Random inputs with several distinct slices of caches; bytes read and operations of a call."""
    row_bytes = form.layout(rank, rope_dim).row_bytes if form else (rank + rope_dim) * 2
    # Ragged: lengths from 1/2 to 3/2 of the mean, with the same number of tokens in total.
    lengths = torch.full((batch,), length, dtype=torch.int32)
    if ragged and batch > 1:
        lengths = torch.linspace(length / 2, length * 3 / 2, batch).round().to(torch.int32)
        lengths = lengths[torch.randperm(batch, generator=torch.Generator().manual_seed(0))]
    longest = int(lengths.max())
    count = min(max(2, int(-(-DISTINCT_BYTES // (batch * length * row_bytes)))), 256) if device == "cuda" else 2
    table = None
    if page_size:
        per = -(-longest // page_size)
        shape = (count, batch * per, page_size)
        table = torch.randperm(batch * per, device=device).to(torch.int32).view(batch, per)
    else:
        shape = (count, batch, longest)
    if form:
        latent = torch.empty(*shape, row_bytes, device=device, dtype=torch.uint8)
        for piece in latent.flatten(0, 1):
            numbers = (torch.randn(*piece.shape[:-1], d, device=device) for d in (rank, rope_dim))
            piece.copy_(naive_pack(*numbers, form))
        rope = None
    else:
        latent = torch.empty(*shape, rank, device=device, dtype=half(device)).normal_()
        rope = torch.empty(*shape, rope_dim, device=device, dtype=half(device)).normal_()
    q = torch.randn(batch, 1, heads, rank, device=device).to(half(device))
    qr = torch.randn(batch, 1, heads, rope_dim, device=device).to(half(device))
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, 1, device=device)
    total = int(lengths.sum())
    nbytes, flops = total * row_bytes, 2 * heads * total * (2 * rank + rope_dim)
    return (q, qr, latent, rope, lengths.to(device), table, out, lse, form), nbytes, flops


def decode_calls(slices: Slices, config: DecodeConfig | None, num_splits: int) -> list[Callable[[], None]]:
    """One call per slice."""
    q, qr, latent, rope, lengths, table, out, lse, form = slices
    scale = (q.shape[3] + qr.shape[3]) ** -0.5

    def call(i: int) -> None:
        problem = DecodeProblem(
            q, qr, latent[i], None if form else rope[i], lengths, table, scale, num_splits, 0.0, 0, None, None, out, lse, form
        )  # fmt: skip
        launch_decode(problem, config)

    return [lambda i=i: call(i) for i in range(latent.shape[0])]


def row_error(slices: Slices, config: DecodeConfig | None, num_splits: int) -> float:
    """Largest distance of a row from float32 products of the same numbers over the row's norm, in a few sequences."""
    q, qr, latent, rope, lengths, table, out, _, form = slices
    out.fill_(torch.nan)
    decode_calls(slices, config, num_splits)[0]()
    worst = 0.0
    for b in sorted({0, q.shape[0] // 3, q.shape[0] // 2, q.shape[0] - 1}):
        c, k = (
            x if x is None else x[0, b] if table is None else x[0][table[b].long()].flatten(0, 1)
            for x in (latent, rope)
        )
        n = int(lengths[b])
        if form:
            c, k = naive_unpack(c[:n], q.shape[3], qr.shape[3], form, torch.float32)
        else:
            c, k = c[:n].float(), k[:n].float()
        scores = (q[b, 0].float() @ c.T + qr[b, 0].float() @ k.T) * (q.shape[3] + qr.shape[3]) ** -0.5
        expected = scores.softmax(-1) @ c
        # The output was filled with NaN, so a row that no program wrote counts as infinitely wrong.
        error = (out[b, 0].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = max(worst, error.nan_to_num(torch.inf).max().item())
    return worst


# Inputs of the last shape, drawn once in a process for all configurations.
_inputs: dict[Shape, tuple[Slices, int, int]] = {}


def forget_inputs() -> None:
    """Free the inputs of the last shape."""
    _inputs.clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def measure(shape: Shape, config: DecodeConfig | None, num_splits: int, device: str) -> dict[str, float]:
    """Microseconds, GB/s, TFLOP/s and error of one configuration."""
    if shape not in _inputs:
        forget_inputs()
        _inputs[shape] = make_slices(*shape, device)
    slices, nbytes, flops = _inputs[shape]
    error = row_error(slices, config, num_splits)
    us = time_calls(decode_calls(slices, config, num_splits), device)
    return {"us": us, "gb_s": nbytes / us / 1e3, "tflop_s": flops / us / 1e6, "error": error}
