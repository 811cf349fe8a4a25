r"""The decode kernels on a GPU: correctness, tuning, and speed as a share of what the card can reach.

In this order, on a kind of card where they have not run:

    python benchmarks/kernels_gpu grid  --seconds 300
    python benchmarks/kernels_gpu tune  --seconds 60 --limit 5 --shape 256,64,32 --shape 128,64,32 --shape 96,32,32 \
        --shape 160,32,14 --shape 384,64,32 --shape 512,32,32 --at 32x8192
    python benchmarks/kernels_gpu tune  --seconds 40 --limit 4 --shape 512,64,32 --at 1x8192 --at 128x8192 --at 8x8192
    python benchmarks/kernels_gpu parts --seconds 20 --shape 512,64,32 --at 32x8192 --at 128x8192
    python benchmarks/kernels_gpu speed --seconds 60 --tuned kernel-results/tune.json
    mla-convert bench --config llama2-7b --rank 512 --context 8192 --batch max --memory 70GB
    mla-convert bench --config llama-8b --rank 512 --context 32768 --batch max --memory 70GB

Results are printed at once and written to --out as JSON lines, with a table at the end. GPU work runs in worker processes: a
configuration that breaks one is reported, and the process is replaced. Timing: one CUDA graph of several calls on different
slices of the cache, at least 256 MB, so that the L2 does not hold the cache; CUDA events around the replays; median.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The kernels of this checkout go before installed ones; the cases and the fix for the interpreter are the tests' own.
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "kernels" / "torch-ext"), str(ROOT / "tests" / "kernels")]

from breakdown import parts
from correctness import grid
from speed import speed
from tune import parsed, tune


def numbers(separator: str) -> Callable[[str], tuple[int, ...]]:
    """A parser of numbers with `separator` in between."""
    return lambda text: tuple(int(part) for part in text.split(separator))


def main() -> bool:
    """Run a task; returns whether any case was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["grid", "tune", "speed", "parts"])
    parser.add_argument("--seconds", type=float, default=240, help="seconds after which no new work starts")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "kernel-results")))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run in the interpreter")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="worker processes; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="grid: seed of the random cases")
    parser.add_argument(
        "--shape", type=numbers(","), action="append", help="rank,rope,heads; may be given several times"
    )
    parser.add_argument("--at", type=numbers("x"), action="append", help="batch x length, as 32x8192; several times")
    parser.add_argument(
        "--format", action="append", help="tune, speed: bf16, fp8, int8, int4 or mixed, with /G and +8; several times"
    )
    parser.add_argument("--caches", type=int, default=3, help="speed: contiguous; paged; paged with different lengths")
    parser.add_argument("--page-size", type=int, default=0, help="tune: tokens in a page, 0 for a contiguous cache")
    parser.add_argument("--limit", type=int, default=0, help="tune: most configurations of a shape, 0 for all")
    parser.add_argument("--config", type=parsed, action="append", default=[], help="tune: try this first, as printed")
    parser.add_argument(
        "--tuned", type=Path, help="speed: tune.json of an earlier run, in place of the default configurations"
    )
    arguments = parser.parse_args()
    arguments.shape = arguments.shape or [(512, 64, 32)]
    arguments.format = arguments.format or ["bf16"]
    arguments.at = arguments.at or [(32, 8192)]
    if arguments.device == "cpu":
        import triton.runtime.interpreter
        from conftest import let_numpy_index

        # Triton 3.6's interpreter asks for the int of an array, which NumPy 2.4 refuses.
        let_numpy_index(triton.runtime.interpreter)
    return {"grid": grid, "tune": tune, "speed": speed, "parts": parts}[arguments.task](arguments)


if __name__ == "__main__":
    sys.exit(main())
