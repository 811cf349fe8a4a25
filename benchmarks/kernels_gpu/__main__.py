r"""The decode kernels on a GPU: correctness over the whole grid, tuning, and speed against what the card can do.

In this order, on a card that has not seen them yet:

    python benchmarks/kernels_gpu grid  --seconds 300
    python benchmarks/kernels_gpu tune  --seconds 60 --limit 5 --shape 256,64,32 --shape 128,64,32 --shape 96,32,32 \
        --shape 160,32,14 --shape 384,64,32 --shape 512,32,32 --at 32x8192
    python benchmarks/kernels_gpu tune  --seconds 40 --limit 4 --shape 512,64,32 --at 1x8192 --at 128x8192 --at 8x8192
    python benchmarks/kernels_gpu parts --seconds 20 --shape 512,64,32 --at 32x8192 --at 128x8192
    python benchmarks/kernels_gpu speed --seconds 60 --tuned kernel-results/tune.json
    mla-convert bench --config llama2-7b --rank 512 --context 8192 --batch max --memory 70GB
    mla-convert bench --config llama-8b --rank 512 --context 32768 --batch max --memory 70GB

Results are printed as they come and written to --out as JSON lines, with a table at the end. Everything that runs on the GPU
runs in processes of its own: a configuration that breaks one is reported, and the process replaced. Timing: several calls
on different slices of the cache, at least 256 MB of them, in one CUDA graph, so that the L2 does not hold the cache; CUDA
events round the replays; median.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "kernels" / "torch-ext"), str(ROOT / "tests" / "kernels")]

from breakdown import parts
from correctness import grid
from speed import speed
from tune import parsed, tune


def numbers(separator):
    return lambda text: tuple(int(part) for part in text.split(separator))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["grid", "tune", "speed", "parts"])
    parser.add_argument("--seconds", type=float, default=240, help="stop starting new work after this long")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "kernel-results")))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run in the interpreter")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes; 0: all in this one")
    parser.add_argument("--seed", type=int, default=0, help="grid: which cases")
    parser.add_argument(
        "--shape", type=numbers(","), action="append", help="rank,rope,heads; may be given several times"
    )
    parser.add_argument("--at", type=numbers("x"), action="append", help="batch x length, as 32x8192; several times")
    parser.add_argument("--page-size", type=int, default=0, help="tune: tokens in a page, 0 for a contiguous cache")
    parser.add_argument("--limit", type=int, default=0, help="tune: at most so many configurations, 0 for all")
    parser.add_argument("--config", type=parsed, action="append", default=[], help="tune: try this first, as printed")
    parser.add_argument("--tuned", type=Path, help="speed: tune.json of an earlier run; default configurations without")
    arguments = parser.parse_args()
    arguments.shape = arguments.shape or [(512, 64, 32)]
    arguments.at = arguments.at or [(32, 8192)]
    if arguments.device == "cpu":
        import triton.runtime.interpreter
        from conftest import let_numpy_index

        let_numpy_index(triton.runtime.interpreter)
    return {"grid": grid, "tune": tune, "speed": speed, "parts": parts}[arguments.task](arguments)


if __name__ == "__main__":
    sys.exit(main())
