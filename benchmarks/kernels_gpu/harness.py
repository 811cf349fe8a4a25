"""What grid, tune and speed share: log, timing, inputs, and how fast the card is."""

import json
import platform
import statistics
import time

import torch
import triton
import triton.language as tl

from mla_attention.decode import launch_decode

DISTINCT_BYTES = 256e6
START = time.monotonic()


def half(device):
    """bfloat16; in the interpreter float16, since Triton's multiplies bfloat16 bit patterns as integers."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def left(arguments):
    return arguments.seconds - (time.monotonic() - START)


def device_name(device):
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    return f"{name}, torch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}"


class Log:
    """JSON lines that are on disk as soon as they are known, and the same to the terminal in short."""

    def __init__(self, folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"{name}.jsonl").open("w")

    def add(self, text=None, **row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if text:
            print(f"[{time.monotonic() - START:5.0f}s] {text}", flush=True)


def time_calls(calls, device, replays=9):
    """Median microseconds of one of `calls`, run one after another in one CUDA graph."""
    if device == "cpu":  # a dry run in the interpreter: every line is run, the figure means nothing
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
    while True:  # clocks up
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
    tl.store(total + tl.program_id(0), tl.sum(seen, 0))


def read_bandwidth(device):
    """GB/s of a kernel that only reads."""
    block, pieces = 4096, 32
    programs = (4 << 30) // (block * pieces * 4) if device == "cuda" else 2
    x = torch.ones(programs * block * pieces, device=device)
    total = torch.empty(programs, device=device)
    us = time_calls([lambda: read_kernel[(programs,)](x, total, block, pieces, num_warps=8)], device)
    return x.numel() * 4 / us / 1e3


def matmul_rate(device):
    """TFLOP/s of torch.mm in bfloat16."""
    n = 8192 if device == "cuda" else 64
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * n**3 / time_calls([lambda: torch.mm(a, b)] * 4, device) / 1e6


def ceilings(device):
    """Read bandwidth and matrix rate of this card, now; and its name."""
    forget_inputs()
    result = read_bandwidth(device), matmul_rate(device), device_name(device)
    forget_inputs()
    return result


def make_slices(rank, rope_dim, heads, batch, length, page_size, ragged, device):
    """Queries, several distinct slices of caches, lengths and block table, all random normal; bytes and operations."""
    row_bytes = (rank + rope_dim) * 2
    # Ragged: lengths from 1/2 to 3/2 of the mean, the same number of tokens in all.
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
    latent = torch.empty(*shape, rank, device=device, dtype=half(device)).normal_()
    rope = torch.empty(*shape, rope_dim, device=device, dtype=half(device)).normal_()
    q = torch.randn(batch, 1, heads, rank, device=device).to(half(device))
    qr = torch.randn(batch, 1, heads, rope_dim, device=device).to(half(device))
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, 1, device=device)
    total = int(lengths.sum())
    nbytes, flops = total * row_bytes, 2 * heads * total * (2 * rank + rope_dim)
    return (q, qr, latent, rope, lengths.to(device), table, out, lse), nbytes, flops


def decode_calls(slices, config, num_splits):
    """One call per slice."""
    q, qr, latent, rope, lengths, table, out, lse = slices
    scale = (q.shape[3] + qr.shape[3]) ** -0.5

    def call(i):
        launch_decode(q, qr, latent[i], rope[i], lengths, table, scale, num_splits, 0.0, 0, out, lse, config)

    return [lambda i=i: call(i) for i in range(latent.shape[0])]


def row_error(slices, config, num_splits):
    """Largest distance of a row from float32 products of the same numbers, over its norm, in a few sequences."""
    q, qr, latent, rope, lengths, table, out, _ = slices
    out.fill_(torch.nan)
    decode_calls(slices, config, num_splits)[0]()
    worst = 0.0
    for b in sorted({0, q.shape[0] // 3, q.shape[0] // 2, q.shape[0] - 1}):
        c, k = (x[0, b] if table is None else x[0][table[b].long()].flatten(0, 1) for x in (latent, rope))
        n = int(lengths[b])
        c, k = c[:n].float(), k[:n].float()
        scores = (q[b, 0].float() @ c.T + qr[b, 0].float() @ k.T) * (q.shape[3] + qr.shape[3]) ** -0.5
        want = scores.softmax(-1) @ c
        error = (out[b, 0].float() - want).norm(dim=-1) / want.norm(dim=-1)
        worst = max(worst, error.nan_to_num(torch.inf).max().item())
    return worst


# Inputs of the last shape: drawn once in a process, not for every configuration.
_inputs = {}


def forget_inputs():
    """Give the memory of the last shape back to the device."""
    _inputs.clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def measure(shape, config, num_splits, device):
    """Microseconds, GB/s, TFLOP/s and error of one configuration. `shape`: make_slices' arguments up to the device."""
    if shape not in _inputs:
        forget_inputs()
        _inputs[shape] = make_slices(*shape, device)
    slices, nbytes, flops = _inputs[shape]
    error = row_error(slices, config, num_splits)
    us = time_calls(decode_calls(slices, config, num_splits), device)
    return {"us": us, "gb_s": nbytes / us / 1e3, "tflop_s": flops / us / 1e6, "error": error}
