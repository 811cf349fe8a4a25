"""Time configurations of the decode kernel at given shapes, the most promising first."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, replace
from typing import Any, get_type_hints

import torch
from gpu_workers import Pool
from harness import Log, Shape, ceilings, half, left, measure, row_format

from mla_attention import decode_kernels, nvrtc, packed_kernels
from mla_attention.decode import launch_decode
from mla_attention.packed import packed_config, packed_shared_memory
from mla_attention.problem import DecodeProblem
from mla_attention.tuning import (
    DecodeConfig,
    default_config,
    hopper_config,
    power_of_two,
    shared_memory,
)

SHARED_LIMIT = 227 * 1024
PROCESSORS = 132  # of the H100, for the number of splits to try
LARGEST_ERROR = 1e-2

# A configuration and a number of splits.
Job = tuple[DecodeConfig, int]


def candidates(rank: int, rope_dim: int, rows: int) -> list[DecodeConfig]:
    """Configurations of the Triton kernel for bfloat16 that fit Hopper's shared memory and registers, most promising first."""
    wide = power_of_two(max(rows, 16))
    configs = []
    for block_m, block_n, warps, stages, per_sm in itertools.product(
        (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4), (1, 2, 3)
    ):
        if (block_m > wide and block_m != 64) or block_m < min(wide, 32):
            continue
        if (
            (block_n == 16 and rank <= 256)
            or (per_sm == 3 and rank > 256)
            or (warps == 8 and block_m * rank < 64 * 128)
        ):
            continue
        config = DecodeConfig(block_m, block_n, warps, stages, per_sm)
        memory = shared_memory(config, rank, rope_dim, 2) + 1024
        accumulators = block_m * rank / (32 * warps)
        registers = 65536 // (32 * warps * per_sm) // 8 * 8
        if memory * per_sm > SHARED_LIMIT or accumulators > 144 or accumulators + 60 > registers:
            continue
        if memory * per_sm < SHARED_LIMIT / 3 and per_sm < 3 and rank >= 96:
            continue  # far too few bytes in flight
        configs.append(replace(config, registers=registers if registers < 255 else 0))
    return sorted(configs, key=lambda config: promise(config, rank, rope_dim, rows), reverse=True)


def packed_candidates(problem: DecodeProblem) -> list[DecodeConfig]:
    """Configurations of the Triton kernel on packed rows that fit Hopper's shared memory and registers."""
    wide = min(max(power_of_two(problem.rows), 16), 64)
    configs = []
    for block_m, block_n, warps, stages in itertools.product({wide, min(wide, 32)}, (32, 64), (4, 8), (3, 2, 4)):
        config = DecodeConfig(block_m, block_n, warps, stages)
        per_sm = min(SHARED_LIMIT // (packed_shared_memory(config, problem) + 2048), 2 if warps == 4 else 1)
        if per_sm and block_m * problem.rank / (32 * warps) <= 144:
            configs.append(replace(config, per_sm=per_sm))
    return configs


def hopper_candidates(rank: int, rope_dim: int) -> list[DecodeConfig]:
    """The CUDA kernel's configuration, if it serves these sizes."""
    return [config for config in (hopper_config(rank, rope_dim),) if config]


def promise(config: DecodeConfig, rank: int, rope_dim: int, rows: int) -> float:
    """Estimate of a configuration's speed: bytes in flight, less the cost of registers and of repeated reads."""
    accumulators = config.block_m * rank / (32 * config.warps)
    tiles = max(config.stages - (config.block_m < 64) - 1, 0.5)
    ahead = config.per_sm * tiles * config.block_n * (rank + rope_dim) * 2
    padding = config.block_m / min(max(rows, 16), config.block_m)
    again = config.block_m < min(rows, 64)  # the cache is read once for every block of rows
    slow = (accumulators > 96) * 0.3 + (padding - 1) * 0.2 + (config.block_n == 16) * 0.3 + again * 0.5
    return min(ahead, 100e3) / 100e3 + (config.block_m >= 64) * 0.4 - slow


def empty_problem(shape: Shape, num_splits: int, device: str, dtype: torch.dtype | None = None) -> DecodeProblem:
    """A problem of this shape on a small cache, without values."""
    rank, rope_dim, heads, batch, length, page_size, _, form = shape
    dtype = dtype or half(device)
    short = page_size or 64
    q = torch.empty(batch, 1, heads, rank, device=device, dtype=dtype)
    qr = torch.empty(batch, 1, heads, rope_dim, device=device, dtype=dtype)
    if form:
        size = form.layout(rank, rope_dim).row_bytes
        latent, rope = torch.empty(batch, short, size, device=device, dtype=torch.uint8), None
    else:
        latent = torch.empty(batch, short, rank, device=device, dtype=dtype)
        rope = torch.empty(batch, short, rope_dim, device=device, dtype=dtype)
    lengths = torch.empty(batch, dtype=torch.int32, device=device)
    table = torch.empty(batch, -(-length // page_size), dtype=torch.int32, device=device) if page_size else None
    lse = torch.empty(batch, heads, 1, device=device)
    return DecodeProblem(
        q, qr, latent, rope, lengths, table, 0.1, num_splits, 0.0, 0, None, None, torch.empty_like(q), lse, form
    )


def build(shape: Shape, config: DecodeConfig, num_splits: int, device: str) -> None:
    """Compile for a shape into the caches on disk, without a launch, which would disturb the timing of other kernels.

    The process cannot launch kernels afterwards.
    """
    if device == "cpu":
        return
    for kernel in (
        decode_kernels.mla_decode_fwd_kernel_split,
        decode_kernels.mla_decode_fwd_kernel_combine,
        packed_kernels.mla_decode_packed_kernel_split,
    ):
        if "run" not in vars(kernel):
            run = kernel.run
            kernel.run = lambda *args, run=run, warmup, **options: run(*args, warmup=True, **options)
    nvrtc.Kernel.launch = lambda *_: None
    launch_decode(empty_problem(shape, num_splits, device), config)


def sweep(
    jobs: list[Job], shape: Shape, builders: Pool, timer: Pool, arguments: argparse.Namespace, log: Log,
    tag: dict[str, Any],
) -> list[tuple[dict[str, float], DecodeConfig, int]]:  # fmt: skip
    """Time jobs in this order as they are built; returns the correct ones, fastest first."""
    waiting, built, timed = list(enumerate(jobs)), [], []
    while (waiting or built or builders.busy or builders.done or timer.busy or timer.done) and left(arguments) > 4:
        while waiting and builders.room:
            number, job = waiting.pop(0)
            builders.start((shape, number, job), build, shape, *job, arguments.device)
        for (of, number, job), _, problem in builders.finished():
            if of != shape:
                continue  # started for the shape before, whose time is up
            if problem:
                log.add(
                    f"not built: {job[0]}: {problem}", kind="unbuilt", **tag, config=asdict(job[0]), problem=problem
                )
            else:
                built.append((number, job))
        if built and timer.room:
            built.sort()
            number, job = built.pop(0)
            timer.start((shape, *job), measure, shape, *job, arguments.device)
        for (of, config, num_splits), row, problem in timer.finished(0.01):
            if of != shape:
                continue
            what = {"config": asdict(config), "num_splits": num_splits}
            if problem:
                log.add(
                    f"FAILED {config} splits {num_splits}: {problem}", kind="failed", **tag, **what, problem=problem
                )
            elif row["error"] > LARGEST_ERROR and arguments.device == "cuda":
                log.add(
                    f"WRONG by {row['error']:.1e}: {config} splits {num_splits}", kind="wrong", **tag, **what, **row
                )
            else:
                log.add(f"{row['us']:8.1f} us {brief(config)} splits={num_splits}", kind="timing", **tag, **what, **row)
                timed.append((row, config, num_splits))
    return sorted(timed, key=lambda entry: entry[0]["us"])


def brief(config: DecodeConfig | None) -> str:
    """A configuration as words `name=value`, without those that are 0."""
    if config is None:
        return "default"
    return " ".join(f"{name}={int(value)}" for name, value in asdict(config).items() if value)


def parsed(text: str) -> DecodeConfig:
    """A configuration from words as `brief` prints them."""
    words = dict(word.split("=") for word in text.split())
    kinds = get_type_hints(DecodeConfig)
    return DecodeConfig(**{name: kinds[name](int(value)) for name, value in words.items()})


def variants(timed: list[tuple[dict[str, float], DecodeConfig, int]], batch: int) -> list[Job]:
    """Variants of the fastest three: dependent launch, other numbers of splits, fewer programs for small batches."""
    more = []
    for _, config, _ in timed[:3]:
        fast = replace(config, pdl=True)
        workers = PROCESSORS * config.per_sm
        more += [(fast, s) for s in sorted({0, max(workers // batch, 1), max(2 * workers // batch, 1), 4}) if s <= 1024]
        if batch < 16 and config.hopper:
            more += [(replace(fast, min_tiles=tiles), 0) for tiles in (2, 4)]
    return list(dict.fromkeys(more))


def tune(arguments: argparse.Namespace) -> bool:
    """Find the fastest configuration of every shape; returns False, as no result is judged."""
    log = Log(arguments.out, "tune")
    builders = Pool(arguments.processes)
    timer = Pool(min(arguments.processes, 1))
    timer.start(None, ceilings, arguments.device)
    while not (done := timer.finished(1)):
        pass
    bandwidth, rate, device = done[0][1]
    log.add(f"{device}: read {bandwidth:.0f} GB/s, matmul {rate:.0f} TFLOP/s", kind="ceilings", device=device,
            gb_s=bandwidth, tflop_s=rate)  # fmt: skip
    best = []
    work = list(itertools.product(arguments.shape, arguments.at, arguments.format))
    whole = arguments.seconds
    for number, ((rank, rope_dim, heads), (batch, length), name) in enumerate(work):
        # Every shape gets an even share of the time that is left, and the second sweep a third of that share.
        arguments.seconds = whole
        share = (left(arguments) - 4) / (len(work) - number)
        end = whole - left(arguments) + share
        tag = {"rank": rank, "rope_dim": rope_dim, "heads": heads, "batch": batch, "length": length,
               "format": name}  # fmt: skip
        form = row_format(name, rank)
        shape = (rank, rope_dim, heads, batch, length, arguments.page_size, False, form)
        jobs = [(config, 0) for config in arguments.config]
        if form:
            problem = empty_problem(shape, 0, "cpu")
            jobs += [(config, 0) for config in (packed_config(problem, SHARED_LIMIT), *packed_candidates(problem))]
        else:
            jobs += [(default_config(rank, rope_dim, heads, half(arguments.device)), 0)]
            jobs += [(config, 0) for config in hopper_candidates(rank, rope_dim)]
            jobs += [(config, 0) for config in candidates(rank, rope_dim, heads)]
        jobs = list(dict.fromkeys(jobs))[: arguments.limit or None]
        arguments.seconds = end - share / 3
        timed = sweep(jobs, shape, builders, timer, arguments, log, tag)
        arguments.seconds = end
        timed += sweep(
            variants(timed, batch) if arguments.device == "cuda" else [], shape, builders, timer, arguments, log, tag
        )
        timed.sort(key=lambda entry: entry[0]["us"])
        for row, config, num_splits in timed[:3]:
            log.add(
                f"BEST {name} {rank}+{rope_dim} h={heads} {batch}x{length}: {row['us']:.1f} us {row['gb_s']:.0f} GB/s "
                f"({row['gb_s'] / bandwidth:.0%}) {row['tflop_s']:.0f} TFLOP/s ({row['tflop_s'] / rate:.0%}) "
                f"{brief(config)} splits={num_splits} error {row['error']:.1e}",
                kind="best", **tag, **row, config=asdict(config), num_splits=num_splits,
            )  # fmt: skip
        if timed:
            row, config, num_splits = timed[0]
            best.append(tag | {"us": row["us"], "share": row["gb_s"] / bandwidth, "num_splits": num_splits,
                               "config": asdict(config), "page_size": arguments.page_size})  # fmt: skip
        report = {"device": device, "gb_s": bandwidth, "tflop_s": rate, "best": best}
        (arguments.out / "tune.json").write_text(json.dumps(report, indent=1))
    builders.close()
    timer.close()
    return False
