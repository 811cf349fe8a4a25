"""The table of speeds: an original and its conversions, each in a process of its own, and ratios to the original."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from folders import FORMS, ROWS, write

ROOT = Path(__file__).resolve().parents[2]


def run(asked: dict, log: Path, timeout: float) -> dict:
    """Time one engine; the log keeps what it prints. Points that were timed before a failure count."""
    program = str(Path(__file__).with_name("timing.py"))
    command = [sys.executable, "-u", program, json.dumps(asked | {"root": str(ROOT)})]
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


def speed(arguments: argparse.Namespace) -> bool:
    """Time every run, and print each row at once; returns whether one failed."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    first, failed = None, False
    for form, cache, nope_dim in arguments.runs:
        rows = cache if cache in ROWS else ""
        folder = write(arguments.out, arguments.shape, form, arguments.rank, arguments.rope_dim, nope_dim, rows)
        asked = {"folder": str(folder), "cache": "auto" if rows else cache, "points": arguments.at, "steps": arguments.steps,
                 "compile": arguments.compile, "kernels": arguments.kernels}  # fmt: skip
        row = run(asked, arguments.out / f"{folder.name}-{cache}.log", arguments.timeout)
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
        f"{row['backend']}, {row['cache_dtype']} of {row['cache_widths']} numbers, graphs {row['graphs']}, "
        f"{row['cache_tokens'] / 1e6:.2f} M tokens fit, started in {row['start_s']:.0f} s"
    )


def _rates(point: dict, original: dict | None) -> str:
    def ratio(key: str) -> str:
        return f" ({point[key] / original[key]:.2f}x)" if original and original is not point else ""

    return (
        f"prompt {point['prompt_tokens_s']:.0f} tokens/s{ratio('prompt_tokens_s')}, decode {point['decode_tokens_s']:.0f} "
        f"tokens/s{ratio('decode_tokens_s')}, {point['step_ms']:.2f} ms a step{'' if point['whole'] else ', NOT ALL DECODING'}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the task."""
    parser.add_argument("--shape", default="llama-8b", help="of mla_convert/evaluate/speed/shapes.py")
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--rope-dim", type=int, default=64)
    parser.add_argument(
        "--runs",
        nargs="+",
        type=_run,
        default=[(form, cache, None) for cache in ("auto", "fp8") for form in FORMS],
        help="FORM:CACHE or FORM:CACHE:NOPE_DIM, of original, portable and plugin, with vLLM's --kv-cache-dtype and content dims "
        f"of a head; ratios are to the first. Of the plugin's packed rows: {', '.join(ROWS)}",
    )
    parser.add_argument("--at", nargs="+", type=_point, default=[(1, 16384), (32, 16384)], help="BATCHxCONTEXT")
    parser.add_argument("--steps", type=int, default=64, help="decode steps that are timed")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as vLLM does by default; starts slowly")
    parser.add_argument("--kernels", action="store_true", help="also profile the kernels of a decode step")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one engine")


def _run(text: str) -> tuple[str, str, int | None]:
    form, cache, nope_dim, *more = [*text.split(":"), "", ""][: max(3, text.count(":") + 1)]
    if form not in FORMS or more:
        raise ValueError(text)
    return form, cache or "auto", int(nope_dim) if nope_dim else None


def _point(text: str) -> tuple[int, int]:
    batch, context = map(int, text.split("x"))
    return batch, context
