"""Speed of the kernels and of the original model's attention, as a share of the card's read bandwidth and matrix rate."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_workers import Pool
from harness import DISTINCT_BYTES, Log, ceilings, forget_inputs, left, measure, row_format, time_calls
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tune import brief

from mla_attention.tuning import DecodeConfig

BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
ORIGINALS = (("Llama-3-8B", 8), ("Llama-2-7B", 32))  # name, key-value heads of 32


def backend_us(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, device: str) -> float:
    """Microseconds of one SDPA backend, or infinity where it does not serve the shape."""
    calls = [lambda i=i: F.scaled_dot_product_attention(q, k[i], v[i]) for i in range(k.shape[0])]
    try:
        with sdpa_kernel(backend):
            return time_calls(calls, device)
    except RuntimeError:
        return float("inf")


def sdpa(
    kv_heads: int, batch: int, length: int, device: str, heads: int = 32, head_dim: int = 128
) -> tuple[float, str]:
    """Microseconds of the fastest SDPA backend on one decode step of the original model's layer, and its name."""
    forget_inputs()
    count = max(2, int(-(-DISTINCT_BYTES // (batch * length * kv_heads * head_dim * 4)))) if device == "cuda" else 2
    shape = (min(count, 128), batch, kv_heads, length, head_dim)
    k, v = (torch.empty(shape, device=device, dtype=torch.bfloat16).normal_() for _ in range(2))
    # The heads of a group are rows of one query, so that every backend reads a key once for all of them.
    q = torch.randn(batch, kv_heads, heads // kv_heads, head_dim, device=device).to(torch.bfloat16)
    backends = BACKENDS if device == "cuda" else (SDPBackend.MATH,)
    return min((backend_us(backend, q, k, v, device), backend.name) for backend in backends)


def nearest(
    tuned: list[dict[str, Any]], rank: int, rope_dim: int, heads: int, batch: int, length: int, form: str = "bf16"
) -> dict[str, Any] | None:
    """The tuned entry of this shape at the closest batch and length, or None."""
    shape = (rank, rope_dim, heads, form)
    same = [e for e in tuned if (e["rank"], e["rope_dim"], e["heads"], e.get("format", "bf16")) == shape]
    return min(same, default=None, key=lambda e: (e["batch"] != batch, abs(e["batch"] * e["length"] - batch * length)))


def alone(pool: Pool, function: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """(result, problem) of one job in a worker process."""
    pool.start(None, function, *args)
    while not (done := pool.finished(1)):
        pass
    return done[0][1:]


def speed(arguments: argparse.Namespace) -> bool:
    """Measure all shapes; returns False, as no result is judged."""
    device = arguments.device
    log = Log(arguments.out, "speed")
    pool = Pool(min(arguments.processes, 1))
    (bandwidth, rate, name), _ = alone(pool, ceilings, device)
    tuned = json.loads(arguments.tuned.read_text())["best"] if arguments.tuned else []
    lines = ["| format | rank + rope | heads | B x S | cache | us | GB/s | of read | TFLOP/s | of matmul | error | config |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    work = itertools.product(arguments.shape, arguments.at, arguments.format)
    for (rank, rope_dim, heads), (batch, length), form in work:
        for page_size, ragged in ((0, False), (64, False), (64, True))[: arguments.caches]:
            if left(arguments) < 10:
                break
            entry = nearest(tuned, rank, rope_dim, heads, batch, length, form)
            config = DecodeConfig(**entry["config"]) if entry else None
            num_splits = entry["num_splits"] if entry and not ragged else 0
            cache = ("paged" if page_size else "contiguous") + (" ragged" if ragged else "")
            tag = {"rank": rank, "rope_dim": rope_dim, "heads": heads, "batch": batch, "length": length, "cache": cache,
                   "format": form}  # fmt: skip
            shape = (rank, rope_dim, heads, batch, length, page_size, ragged, row_format(form, rank))
            row, problem = alone(pool, measure, shape, config, num_splits, device)
            if problem:
                log.add(f"FAILED {tag} {brief(config)}: {problem}", kind="failed", **tag, problem=problem)
                continue
            lines.append(
                f"| {form} | {rank}+{rope_dim} | {heads} | {batch} x {length} | {cache} | {row['us']:.1f} | {row['gb_s']:.0f} | "
                f"{row['gb_s'] / bandwidth:.0%} | {row['tflop_s']:.0f} | {row['tflop_s'] / rate:.0%} | "
                f"{row['error']:.1e} | {brief(config)} splits={num_splits} |"
            )
            log.add(lines[-1], kind="speed", **tag, **row)
    lines += ["", "| original | B x S | us | GB/s | backend |", "|---|---|---|---|---|"]
    for (model, kv_heads), (batch, length) in itertools.product(ORIGINALS, arguments.at):
        nbytes = batch * length * kv_heads * 128 * 4
        if left(arguments) < 5 or nbytes > 20e9:
            continue
        result, problem = alone(pool, sdpa, kv_heads, batch, length, device)
        if problem:
            log.add(f"FAILED {model} {batch} x {length}: {problem}", kind="failed", model=model, problem=problem)
            continue
        us, backend = result
        lines.append(f"| {model} | {batch} x {length} | {us:.1f} | {nbytes / us / 1e3:.0f} | {backend} |")
        log.add(lines[-1], kind="sdpa", model=model, batch=batch, length=length, us=us, backend=backend)
    pool.close()
    head = f"{name}, read {bandwidth:.0f} GB/s, matmul {rate:.0f} TFLOP/s"
    (arguments.out / "speed.md").write_text("\n".join([head, "", *lines, ""]))
    return False
