"""The table of speeds: an original and its conversions, each in a process of its own, and ratios to the original."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from folders import FORMS, ROWS, write

ROOT = Path(__file__).resolve().parents[2]


def run(program: Path, asked: dict, log: Path, timeout: float) -> dict:
    """Time one engine; the log keeps what it prints. Points that were timed before a failure count."""
    command = [sys.executable, "-u", str(program), json.dumps(asked | {"root": str(ROOT)})]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "timeout"
    lines = log.read_text(errors="replace").splitlines()
    found: dict = {"points": {}, "code": code}
    for line in lines:
        kind, _, rest = line.partition(" ")
        if kind == "HEAD":
            found |= json.loads(rest)
        elif kind == "POINT":
            point = json.loads(rest)
            found["points"][point["batch"], point["context"]] = point
    if code:
        print(f"failed ({code}):", *lines[-15:], sep="\n  ", flush=True)
    return found


def speed(program: Path, arguments: argparse.Namespace) -> bool:
    """Time every run by an engine's `program`, and print each row at once; returns whether one failed."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    first, failed = None, False
    for form, cache, nope_dim in arguments.runs:
        rows = cache if cache in ROWS else ""
        folder = write(arguments.out, arguments.shape, form, arguments.rank, arguments.rope_dim, nope_dim, rows)
        asked = {"folder": str(folder), "cache": "auto" if rows else cache, "points": arguments.at, "steps": arguments.steps,
                 "compile": getattr(arguments, "compile", False), "kernels": getattr(arguments, "kernels", False),
                 "backend": getattr(arguments, "backend", None)}  # fmt: skip
        row = run(program, asked, arguments.out / f"{folder.name}-{cache}.log", arguments.timeout)
        failed |= bool(row["code"])
        first = first or row
        form += f", {nope_dim} content dims" if nope_dim else ""
        print(f"{form}, cache {cache}: {_facts(row)}", flush=True)
        for at, point in row["points"].items():
            rates = _rates(point, first["points"].get(at))
            print(f"    {point['batch']:>4} x {point['context']:>6}: {rates}", flush=True)
            for name, launches, microseconds in point["kernels"]:
                print(f"        {microseconds:8.1f} us in {launches:5.1f} launches a step: {name}", flush=True)
        with (arguments.out / "speed.jsonl").open("a") as file:
            points = list(row["points"].values())
            file.write(json.dumps({"form": form, "cache": cache, **row, "points": points}) + "\n")
    return failed


def _facts(row: dict) -> str:
    if "backend" not in row:
        return "did not start"
    return (
        f"{row['backend']}, {row['cache_dtype']} of {row['cache_widths'] or '?'} numbers, graphs {row['graphs']}, "
        f"{row['cache_tokens'] / 1e6:.2f} M tokens fit, started in {row['start_s']:.0f} s"
    )


def _rates(point: dict, original: dict | None) -> str:
    def ratio(key: str) -> str:
        return f" ({point[key] / original[key]:.2f}x)" if original and original is not point else ""

    return (
        f"prompt {point['prompt_tokens_s']:.0f} tokens/s{ratio('prompt_tokens_s')}, decode {point['decode_tokens_s']:.0f} "
        f"tokens/s{ratio('decode_tokens_s')}, {point['step_ms']:.2f} ms a step{'' if point['whole'] else ', NOT ALL DECODING'}"
    )


def add_arguments(parser: argparse.ArgumentParser, caches: Sequence[str] = ("auto", "fp8")) -> None:
    """Options of the task; every form is timed with each of the caches."""
    parser.add_argument("--shape", default="llama-8b", help="of mla_convert/evaluate/speed/shapes.py")
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--rope-dim", type=int, default=64)
    parser.add_argument(
        "--runs",
        nargs="+",
        type=_run,
        default=[(form, cache, None) for cache in caches for form in FORMS],
        help="FORM:CACHE or FORM:CACHE:NOPE_DIM, of original, portable and plugin, with the engine's --kv-cache-dtype and "
        f"content dims of a head; ratios are to the first. Of the plugin's packed rows: {', '.join(ROWS)}",
    )
    parser.add_argument("--at", nargs="+", type=_point, default=[(1, 16384), (32, 16384)], help="BATCHxCONTEXT")
    parser.add_argument("--steps", type=int, default=64, help="decode steps that are timed")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one engine")


def _run(text: str) -> tuple[str, str, int | None]:
    form, cache, nope_dim, *more = [*text.split(":"), "", ""][: max(3, text.count(":") + 1)]
    if form not in FORMS or more:
        raise ValueError(text)
    return form, cache or "auto", int(nope_dim) if nope_dim else None


def _point(text: str) -> tuple[int, int]:
    batch, context = map(int, text.split("x"))
    return batch, context
