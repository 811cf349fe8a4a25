"""The decode kernels on a GPU: correctness over the whole grid, tuning, and speed against what the card can do.

    python benchmarks/kernels_gpu.py grid  --seconds 240
    python benchmarks/kernels_gpu.py tune  --seconds 240 --shape 512,64,32 --at 32x8192
    python benchmarks/kernels_gpu.py speed --seconds 240 --tuned tune.json

Results are printed as they come and written to --out as JSON lines, with a table at the end. A configuration that the card
cannot run is reported and skipped. Timing: several calls on different slices of the cache, at least 256 MB of them, in one
CUDA graph, so that the L2 does not hold the cache; CUDA events round the replays; median.
"""

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels" / "torch-ext"), str(ROOT / "tests" / "kernels")]

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from cases import disagreement, make_case
from torch.nn.attention import SDPBackend, sdpa_kernel

from mla_attention import mla_decode, mla_write, naive_write
from mla_attention.decode import decode_triton, device_limits
from mla_attention.tuning import DecodeConfig, default_config, power_of_two, shared_memory

DISTINCT_BYTES = 256e6
SHARED_LIMIT = 227 * 1024
START = time.monotonic()


def half(device):
    """bfloat16; in the interpreter float16, since Triton's multiplies bfloat16 bit patterns as integers."""
    return torch.bfloat16 if device == "cuda" else torch.float16


class Log:
    """JSON lines that are on disk as soon as they are known, and the same to the terminal in short."""

    def __init__(self, folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"
        self.file = self.path.open("w")
        self.rows = []

    def add(self, text=None, **row):
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if text:
            print(f"[{time.monotonic() - START:5.0f}s] {text}", flush=True)


def left(arguments):
    return arguments.seconds - (time.monotonic() - START)


# --- timing -----------------------------------------------------------------------------------------------------------


def time_calls(calls, device, replays=7):
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
    graph.replay()
    torch.cuda.synchronize()
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


def ceilings(device, log):
    """Read bandwidth in GB/s and bf16 matrix rate in TFLOP/s, of this card, now."""
    block, pieces = 4096, 32
    programs = (4 << 30) // (block * pieces * 4) if device == "cuda" else 2
    x = torch.ones(programs * block * pieces, device=device)
    total = torch.empty(programs, device=device)
    us = time_calls([lambda: read_kernel[(programs,)](x, total, block, pieces, num_warps=8)], device)
    bandwidth = x.numel() * 4 / us / 1e3
    n = 8192 if device == "cuda" else 64
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    rate = 2 * n**3 / time_calls([lambda: torch.mm(a, b)] * 4, device) / 1e6
    log.add(f"read {bandwidth:.0f} GB/s, matmul {rate:.0f} TFLOP/s", kind="ceilings", gb_s=bandwidth, tflop_s=rate)
    return bandwidth, rate


def make_slices(rank, rope_dim, heads, batch, length, device, page_size=0, ragged=False, tokens=1):
    """Queries, several distinct slices of caches, lengths and block table, all random normal bf16."""
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
    q = torch.randn(batch, tokens, heads, rank, device=device).to(half(device))
    qr = torch.randn(batch, tokens, heads, rope_dim, device=device).to(half(device))
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, device=device)
    nbytes, flops = int(lengths.sum()) * row_bytes, 2 * heads * tokens * int(lengths.sum()) * (2 * rank + rope_dim)
    return (q, qr, latent, rope, lengths.to(device), table, out, lse), nbytes, flops


def decode_calls(slices, config, num_splits=0):
    q, qr, latent, rope, lengths, table, out, lse = slices
    scale = (q.shape[3] + qr.shape[3]) ** -0.5

    def call(i):
        decode_triton(q, qr, latent[i], rope[i], lengths, table, scale, num_splits, 0.0, 0, out, lse, config)

    return [lambda i=i: call(i) for i in range(latent.shape[0])]


def relative_error(slices, config, num_splits=0):
    """Of the last sequence, first slice, against float32 products of the same numbers."""
    q, qr, latent, rope, lengths, table, out, _ = slices
    out.fill_(torch.nan)
    decode_calls(slices, config, num_splits)[0]()
    c, k = (x[0, -1] if table is None else x[0][table[-1].long()].flatten(0, 1) for x in (latent, rope))
    n = int(lengths[-1])
    c, k = c[:n].float(), k[:n].float()
    scores = (q[-1, 0].float() @ c.T + qr[-1, 0].float() @ k.T) * (q.shape[3] + qr.shape[3]) ** -0.5
    want = scores.softmax(-1) @ c
    return ((out[-1, 0].float() - want).norm() / want.norm()).item()


# --- grid -------------------------------------------------------------------------------------------------------------

LENGTHS = ([0, 1, 15, 16], [17, 31, 33, 64], [63, 65, 127, 3], [1000, 4096, 1, 0], [700, 20, 513, 2049])
HEADS = (1, 3, 9, 14, 16, 32, 63, 64, 128)


def grid_groups(seed):
    """Kernels to build, endlessly: everything that is fixed when one is compiled."""
    rng = random.Random(seed)
    ranks = [64, 128, 256, 512, 576, 96, 160, 384, 144, *range(16, 577, 16)]
    for index in itertools.count():
        rank = ranks[index % len(ranks)]
        dtype = rng.choice(["bfloat16", "bfloat16", "float16", "float32"])
        rope_dim = rng.choice(range(0, 129, 16))
        pool = [default_config(rank, rope_dim, rng.choice([8, 32, 128]), getattr(torch, dtype))]
        if dtype != "float32":
            pool += candidates(rank, rope_dim, rng.choice([8, 32, 128]))
        config = replace(rng.choice(pool), pdl=rng.random() < 0.3, tma=rng.random() < 0.3, min_tiles=rng.choice([1, 4]))
        yield {
            "rank": rank, "rope_dim": rope_dim, "dtype": dtype, "page_size": rng.choice([0, 0, 1, 16, 64, 128]),
            "config": asdict(config), "num_splits": rng.choice([0, 0, 0, 1, 3]),
            "softcap": rng.choice([0.0, 0.0, 0.0, 5.0]), "window": rng.choice([None, None, None, 50]),
            "seed": index,
        }  # fmt: skip


def fitted(group, device):
    """The group itself, or what the interpreter can do of it in reasonable time."""
    if device == "cuda":
        return group
    return group | {"rank": 16 + group["rank"] % 48 // 16 * 16, "rope_dim": group["rope_dim"] % 32, "dtype": "float32",
                    "config": group["config"] | {"pdl": False}}  # fmt: skip


def run_group(group, device, cases=12):
    """Results of one kernel on several lengths, head counts and numbers of query tokens: (case, what is wrong or None)."""
    rng = random.Random(group["seed"])
    config = DecodeConfig(**group["config"])
    dtype = getattr(torch, group["dtype"])
    options = {"softcap": group["softcap"], "window": group["window"]}
    results = []
    for number in range(cases):
        tokens = rng.choice([1, 1, 2, 4])
        heads = rng.choice(HEADS if device == "cuda" else [1, 3])
        lengths = LENGTHS[number % len(LENGTHS)] if device == "cuda" else LENGTHS[number % 2]
        if number == cases - 1 and group["seed"] % 25 == 0 and device == "cuda":
            lengths = [131072, 5, 70000, 0]
        label = {"heads": heads, "tokens": tokens, "lengths": lengths}
        try:
            case = make_case(4, tokens, heads, group["rank"], group["rope_dim"], lengths, dtype, group["page_size"],
                             device, seed=number)  # fmt: skip
            out = torch.full_like(case["q_latent"], torch.nan)
            lse = torch.full((4, heads, tokens), torch.nan, device=device)
            decode_triton(case["q_latent"], case["q_rope"], case["latent_cache"], case["rope_cache"],
                          case["cache_seqlens"], case.get("block_table"), case["softmax_scale"], group["num_splits"],
                          group["softcap"], group["window"] or 0, out, lse, config)  # fmt: skip
            problem = disagreement(out, lse, case, **options)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            results.append((label, text))
            if "out of resource" in text.lower():
                return results[-1:], "skipped"
            return results, "error"
        results.append((label, problem))
    return results, "run"


def large_offsets(device):
    """A cache of more than 2^31 numbers, of which the last rows are used."""
    span = (1 << 21) + 64
    latent = torch.empty(3, span, 512, device=device, dtype=torch.bfloat16)
    rope = torch.empty(3, span, 64, device=device, dtype=torch.bfloat16)
    case = make_case(3, 1, 32, 512, 64, [100, 40, 3000], torch.bfloat16, device=device)
    rows = case["latent_cache"].shape[1]
    latent[:, :rows], rope[:, :rows] = case["latent_cache"], case["rope_cache"]
    small = dict(case)
    case |= {"latent_cache": latent, "rope_cache": rope}
    out, lse = torch.full_like(case["q_latent"], torch.nan), torch.full((3, 32, 1), torch.nan, device=device)
    decode_triton(case["q_latent"], case["q_rope"], latent, rope, case["cache_seqlens"], None, case["softmax_scale"], 0,
                  0.0, 0, out, lse)  # fmt: skip
    return disagreement(out, lse, small)


def operators(device):
    """What is wrong with the public functions, called as a model does: write new tokens, then decode, compiled and not."""
    batch, tokens, heads, rank, planes = 2, 3, 32, 512, 32
    case = make_case(batch, tokens, heads, rank, 2 * planes, [100, 37], half(device), 64, device)
    positions = case["cache_seqlens"][:, None] - tokens + torch.arange(tokens, device=device, dtype=torch.int32)
    angles = torch.rand(batch, tokens, planes, device=device) * 6
    compressed = torch.randn(batch, tokens, rank + 2 * planes, device=device).to(half(device))
    new = {"latent": compressed[..., :rank], "k_rope": compressed[..., rank:], "q_rope": case["q_rope"],
           "cos": angles.cos(), "sin": angles.sin(), "positions": positions, "block_table": case["block_table"]}  # fmt: skip
    caches = {name: case[name].clone() for name in ("latent_cache", "rope_cache")}
    want = naive_write(**new, **caches)
    case["q_rope"] = mla_write(**new, latent_cache=case["latent_cache"], rope_cache=case["rope_cache"])
    for mine, reference in ((case["q_rope"], want), *((case[name], caches[name]) for name in caches)):
        if not torch.allclose(mine.float(), reference.float(), atol=2e-3, rtol=1e-2, equal_nan=True):
            return "mla_write differs from its reference"
    scale = case["softmax_scale"]
    out, lse = mla_decode(**case, return_lse=True)
    compiled = torch.compile(
        lambda inputs: mla_decode(**inputs, softmax_scale=scale), fullgraph=True, backend="aot_eager"
    )
    again = compiled({name: value for name, value in case.items() if torch.is_tensor(value)})
    if not torch.equal(again, out):
        return "mla_decode differs when compiled"
    return disagreement(out, lse, case)


def attempt(check, device):
    """What `check` finds wrong; an exception is as wrong as a result."""
    try:
        return check(device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]


def grid(arguments):
    log = Log(arguments.out, "grid")
    counts = {"run": 0, "skipped": 0, "error": 0}
    passed, failures = 0, []

    def take(group, outcome):
        nonlocal passed
        results, state = outcome
        counts[state] += 1
        for label, problem in results if state != "skipped" else []:
            passed += problem is None
            if problem:
                failures.append(problem)
                log.add(f"FAIL {problem} {label} {group}" if len(failures) <= 12 else None,
                        kind="failure", problem=problem, **label, group=group)  # fmt: skip

    problem = attempt(operators, arguments.device)
    log.add(f"operators: {problem or 'right'}", kind="operators", problem=problem)
    failures += [problem] if problem else []
    if arguments.device == "cuda":
        problem = attempt(large_offsets, "cuda")
        torch.cuda.empty_cache()
        log.add(f"more than 2^31 numbers: {problem or 'right'}", kind="large_offsets", problem=problem)
        failures += [problem] if problem else []
    groups = grid_groups(arguments.seed)
    if not arguments.processes:
        while left(arguments) > 0:
            group = fitted(next(groups), arguments.device)
            take(group, run_group(group, arguments.device))
    else:
        with ProcessPoolExecutor(arguments.processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
            waiting = {}
            while left(arguments) > 0:
                while len(waiting) < 2 * arguments.processes:
                    group = fitted(next(groups), arguments.device)
                    waiting[pool.submit(run_group, group, arguments.device)] = group
                ready = [future for future in waiting if future.done()]
                for future in ready:
                    group = waiting.pop(future)
                    try:
                        take(group, future.result())
                    except BrokenProcessPool:
                        take(group, ([({}, "a process died")], "error"))
                        arguments.seconds = 0
                        break
                time.sleep(0 if ready else 0.05)
            for future in waiting:
                future.cancel()
            for future, group in waiting.items():
                if not future.cancelled() and not future.exception():
                    take(group, future.result())
    log.add(f"{passed} cases right, {len(failures)} wrong; kernels: {counts}", kind="summary", passed=passed,
            failed=len(failures), kernels=counts, device=device_name(arguments.device))  # fmt: skip
    return bool(failures)


# --- tune -------------------------------------------------------------------------------------------------------------


def candidates(rank, rope_dim, rows):
    """Configurations worth trying for bf16: those that the shared memory and the registers of Hopper can hold."""
    wide = power_of_two(max(rows, 16))
    found = []
    for swap, block_m, block_n, warps, stages, per_sm, tma in itertools.product(
        (False, True), (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4, 5), (1, 2, 3), (False, True)
    ):
        padded_for_wgmma = block_m == 64 and not swap
        if (block_m > wide and not padded_for_wgmma) or block_m < min(wide, 32) or (swap and block_m > 64):
            continue
        # One tile and nothing in flight pays only where another program computes meanwhile and loads need no registers.
        if tma != (stages == 1) or (stages == 1 and (per_sm == 1 or block_n < 64)):
            continue
        if (stages == 5 and block_n > 32) or (block_n == 16 and rank <= 256) or (per_sm == 3 and rank > 256):
            continue
        if warps == 8 and block_m * rank < 64 * 128:
            continue
        config = DecodeConfig(block_m, block_n, swap, warps, stages, per_sm, tma=tma)
        memory = shared_memory(config, rank, rope_dim, 2) + 1024
        accumulators = block_m * rank / (32 * warps)
        registers = 65536 // (32 * warps * per_sm) // 8 * 8
        if memory * per_sm > SHARED_LIMIT or accumulators > 144 or accumulators + 60 > registers:
            continue
        if memory * per_sm < SHARED_LIMIT / 3 and per_sm < 3 and rank >= 96:
            continue  # far too few bytes in flight
        found.append(replace(config, registers=registers if registers < 255 else 0))
    return found


def build(shape, config, num_splits, device):
    """Compile for a shape by a launch on a short cache; what is wrong, or None. Runs in a process of its own."""
    rank, rope_dim, heads, batch, page_size = shape
    try:
        short = 64 if not page_size else max(64, page_size)
        q = torch.zeros(batch, 1, heads, rank, device=device, dtype=half(device))
        qr = torch.zeros(batch, 1, heads, rope_dim, device=device, dtype=half(device))
        outer = (batch * short // page_size, page_size) if page_size else (batch, short)
        latent = torch.zeros(*outer, rank, device=device, dtype=half(device))
        rope = torch.zeros(*outer, rope_dim, device=device, dtype=half(device))
        lengths = torch.full((batch,), short, dtype=torch.int32, device=device)
        table = None
        if page_size:  # as many columns as strides divisible by 16 need, since that is compiled in
            table = torch.zeros(batch, 16, dtype=torch.int32, device=device)
        out, lse = torch.empty_like(q), torch.empty(batch, heads, 1, device=device)
        decode_triton(q, qr, latent, rope, lengths, table, 0.1, num_splits, 0.0, 0, out, lse, config)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def build_all(pool, jobs, arguments):
    """(shape, config, splits) jobs that can be run, built by many processes at once into Triton's cache on disk."""
    if pool is None:
        return [(job, build(*job, arguments.device)) for job in jobs]
    futures = {pool.submit(build, *job, arguments.device): job for job in jobs}
    done = []
    try:
        for future in as_completed(futures, timeout=max(left(arguments) / 2, 1)):
            done.append((futures[future], future.result()))
    except TimeoutError:
        for future in futures:
            future.cancel()
    return done


def measure(slices, nbytes, config, num_splits, device):
    """(microseconds, GB/s, relative error)."""
    error = relative_error(slices, config, num_splits)
    us = time_calls(decode_calls(slices, config, num_splits), device)
    return us, nbytes / us / 1e3, error


def sweep(jobs, slices, nbytes, arguments, log, tag, state):
    """Measure the built jobs, fastest first in the result."""
    found = []
    for (_, config, num_splits), problem in state:
        if problem:
            log.add(kind="unbuilt", **tag, config=asdict(config), problem=problem)
            continue
        if left(arguments) < 5:
            break
        try:
            us, gb_s, error = measure(slices, nbytes, config, num_splits, arguments.device)
        except Exception as failure:
            log.add(f"failed: {config}: {failure}"[:300], kind="failed", **tag, config=asdict(config))
            continue
        row = {"us": us, "gb_s": gb_s, "error": error, "config": asdict(config), "num_splits": num_splits}
        log.add(kind="timing", **tag, **row)
        if error < 8e-3:
            found.append((us, config, num_splits, error))
        else:
            log.add(f"WRONG by {error:.1e}: {config} splits {num_splits}", kind="wrong", **tag, **row)
    return sorted(found, key=lambda entry: entry[0])


def tune(arguments):
    log = Log(arguments.out, "tune")
    bandwidth, rate = ceilings(arguments.device, log)
    best = []
    context = torch.multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(arguments.processes, mp_context=context) if arguments.processes else None
    work = list(itertools.product(arguments.shape, arguments.at))
    whole = arguments.seconds
    for number, ((rank, rope_dim, heads), (batch, length)) in enumerate(work):
        # An even share of what is left, so that every shape gets its turn.
        spent = time.monotonic() - START
        arguments.seconds = spent + (whole - spent - 4) / (len(work) - number)
        tag = {"rank": rank, "rope_dim": rope_dim, "heads": heads, "batch": batch, "length": length}
        shape = (rank, rope_dim, heads, batch, arguments.page_size)
        slices, nbytes, flops = make_slices(rank, rope_dim, heads, batch, length, arguments.device, arguments.page_size)
        jobs = [(shape, config, 0) for config in candidates(rank, rope_dim, heads)]
        random.Random(0).shuffle(jobs)
        jobs.insert(0, (shape, default_config(rank, rope_dim, heads, half(arguments.device)), 0))
        if arguments.limit:
            jobs = jobs[: arguments.limit]
        found = sweep(jobs, slices, nbytes, arguments, log, tag, build_all(pool, jobs, arguments))
        more = []
        for _, config, _, _ in found[:4]:
            fast = replace(config, pdl=arguments.device == "cuda")  # the interpreter has no dependent launches
            more += [(shape, fast, 0), (shape, replace(config, tma=True), 0), (shape, replace(fast, tma=True), 0)]
            more += [(shape, replace(fast, min_tiles=tiles), 0) for tiles in (2, 4, 8)]
            workers = device_limits(slices[0].device)[0] * config.per_sm
            splits = {max(workers // batch, 1), -(-workers // batch), 1 if batch > 64 else 4}
            more += [(shape, fast, s) for s in splits if s <= 1024]
        found += sweep(more, slices, nbytes, arguments, log, tag, build_all(pool, more, arguments))
        found.sort(key=lambda entry: entry[0])
        for us, config, num_splits, error in found[:3]:
            short = " ".join(f"{k}={int(v)}" for k, v in asdict(config).items() if v)
            log.add(
                f"{rank}+{rope_dim} h={heads} {batch}x{length}: {us:.1f} us {nbytes / us / 1e3:.0f} GB/s "
                f"({nbytes / us / 1e3 / bandwidth:.0%}) {flops / us / 1e6:.0f} TFLOP/s ({flops / us / 1e6 / rate:.0%}) "
                f"{short} splits={num_splits} err {error:.1e}", kind="best", **tag, us=us,
                config=asdict(config), num_splits=num_splits,
            )  # fmt: skip
        if found:
            us, config, num_splits, _ = found[0]
            best.append(tag | {"us": us, "share": nbytes / us / 1e3 / bandwidth, "num_splits": num_splits,
                               "config": asdict(config), "page_size": arguments.page_size})  # fmt: skip
        (arguments.out / "tune.json").write_text(
            json.dumps(
                {"device": device_name(arguments.device), "gb_s": bandwidth, "tflop_s": rate, "best": best}, indent=1
            )
        )
        del slices
    if pool:
        pool.shutdown(cancel_futures=True)
    return False


# --- speed ------------------------------------------------------------------------------------------------------------


def sdpa_us(kv_heads, batch, length, device, heads=32, head_dim=128):
    """Fastest SDPA backend on one decode step of the original model's layer, and its name."""
    count = max(2, int(-(-DISTINCT_BYTES // (batch * length * kv_heads * head_dim * 4)))) if device == "cuda" else 2
    count = min(count, 128)
    shape = (count, batch, kv_heads, length, head_dim)
    k, v = (torch.empty(shape, device=device, dtype=torch.bfloat16).normal_() for _ in range(2))
    # A group's heads are rows of one query: every backend reads a key once for all of them.
    q = torch.randn(batch, kv_heads, heads // kv_heads, head_dim, device=device).to(torch.bfloat16)
    best = (float("inf"), "none")
    for backend in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ):
        if backend == SDPBackend.MATH and device == "cuda":
            continue
        try:
            with sdpa_kernel(backend):
                calls = [lambda i=i: F.scaled_dot_product_attention(q, k[i], v[i]) for i in range(count)]
                best = min(best, (time_calls(calls, device), backend.name))
        except RuntimeError:
            continue  # the backend does not serve this shape
    return best


def nearest(tuned, rank, rope_dim, heads, batch, length):
    """The tuned entry of this shape at the closest batch and length, or None."""
    same = [e for e in tuned if (e["rank"], e["rope_dim"], e["heads"]) == (rank, rope_dim, heads)]
    return min(same, default=None, key=lambda e: (e["batch"] != batch, abs(e["batch"] * e["length"] - batch * length)))


def speed(arguments):
    log = Log(arguments.out, "speed")
    bandwidth, rate = ceilings(arguments.device, log)
    tuned = json.loads(arguments.tuned.read_text())["best"] if arguments.tuned else []
    lines = ["| rank + rope | heads | B x S | cache | us | GB/s | of read | TFLOP/s | of matmul | error | config |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (rank, rope_dim, heads), (batch, length) in itertools.product(arguments.shape, arguments.at):
        for page_size, ragged in ((0, False), (64, False), (64, True)):
            if left(arguments) < 10:
                break
            entry = nearest(tuned, rank, rope_dim, heads, batch, length)
            config = DecodeConfig(**entry["config"]) if entry else default_config(rank, rope_dim, heads, torch.bfloat16)
            cache = ("paged" if page_size else "contiguous") + (" ragged" if ragged else "")
            tag = {"rank": rank, "rope_dim": rope_dim, "heads": heads, "batch": batch, "length": length, "cache": cache}
            try:
                slices, nbytes, flops = make_slices(
                    rank, rope_dim, heads, batch, length, arguments.device, page_size, ragged
                )
                num_splits = entry["num_splits"] if entry and not ragged else 0
                us, gb_s, error = measure(slices, nbytes, config, num_splits, arguments.device)
            except Exception as failure:
                log.add(f"failed {tag}: {failure}"[:300], kind="failed", **tag)
                continue
            tflop_s = flops / us / 1e6
            short = " ".join(f"{k}={int(v)}" for k, v in asdict(config).items() if v)
            lines.append(
                f"| {rank}+{rope_dim} | {heads} | {batch} x {length} | {cache} | {us:.1f} | {gb_s:.0f} | "
                f"{gb_s / bandwidth:.0%} | {tflop_s:.0f} | {tflop_s / rate:.0%} | {error:.1e} | {short} |"
            )
            log.add(
                lines[-1], kind="speed", **tag, us=us, gb_s=gb_s, tflop_s=tflop_s, error=error, config=asdict(config)
            )
            del slices
    lines += ["", "| original | B x S | us | GB/s | backend |", "|---|---|---|---|---|"]
    for (name, kv_heads), (batch, length) in itertools.product((("Llama-3-8B", 8), ("Llama-2-7B", 32)), arguments.at):
        nbytes = batch * length * kv_heads * 128 * 4
        if left(arguments) < 5 or nbytes > 20e9:
            continue
        us, backend = sdpa_us(kv_heads, batch, length, arguments.device)
        lines.append(f"| {name} | {batch} x {length} | {us:.1f} | {nbytes / us / 1e3:.0f} | {backend} |")
        log.add(lines[-1], kind="sdpa", model=name, batch=batch, length=length, us=us, backend=backend)
    head = f"{device_name(arguments.device)}, read {bandwidth:.0f} GB/s, matmul {rate:.0f} TFLOP/s"
    (arguments.out / "speed.md").write_text("\n".join([head, "", *lines, ""]))
    return False


# --- command line -----------------------------------------------------------------------------------------------------


def device_name(device):
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    return f"{name}, torch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}"


def numbers(separator):
    return lambda text: tuple(int(part) for part in text.split(separator))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["grid", "tune", "speed"])
    parser.add_argument("--seconds", type=float, default=240, help="stop starting new work after this long")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "kernel-results")))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run in the interpreter")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes that compile; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="grid: which cases")
    parser.add_argument(
        "--shape", type=numbers(","), action="append", help="rank,rope,heads; may be given several times"
    )
    parser.add_argument("--at", type=numbers("x"), action="append", help="batch x length, as 32x8192; several times")
    parser.add_argument("--page-size", type=int, default=0, help="tune: tokens in a page, 0 for a contiguous cache")
    parser.add_argument("--limit", type=int, default=0, help="tune: at most so many configurations, 0 for all")
    parser.add_argument("--tuned", type=Path, help="speed: tune.json of an earlier run; default configurations without")
    arguments = parser.parse_args()
    arguments.shape = arguments.shape or [(512, 64, 32)]
    arguments.at = arguments.at or [(32, 8192)]
    return {"grid": grid, "tune": tune, "speed": speed}[arguments.task](arguments)


if __name__ == "__main__":
    sys.exit(main())
