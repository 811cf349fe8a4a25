"""vLLM on a GPU: correctness of converted models, and their speed against the original.

    python benchmarks/vllm_gpu correctness CONVERTED [CONVERTED ...]
    python benchmarks/vllm_gpu speed --at 1x16384 32x16384 64x2048

Needs vLLM 0.26 (`pip install mla_convert[vllm]`). For a machine without network, prepare.sh packs it and assemble.sh unpacks
it. Speed is measured on random weights: each engine runs in a process of its own, with CUDA graphs for decodes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "engines_gpu"), str(HERE.parents[1])]

import correctness
import speed

from mla_convert.publish.engines.ask_engine import ask_vllm

# CUDA graphs for decodes without torch.compile, which takes most of the time of a start.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
ENGINE = correctness.Engine(
    HERE,
    {
        "eager": {"eager": True},
        "graphs": {"eager": False, "compilation": GRAPHS},
        "graphs, chunks, prefixes": {"eager": False, "compilation": GRAPHS, "chunk": 48, "prefix_caching": True},
        "as vLLM starts": {"eager": False, "prefix_caching": True},
    },
    ask_vllm,
    # vLLM's own measurement of free memory fails where engines start at the same time.
    {"memory": 0.1, "cache_bytes": 1 << 30},
    {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
     "VLLM_LOGGING_LEVEL": "WARNING"},
)  # fmt: skip


def main() -> bool:
    """Run a task; returns whether something was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    correctness.add_arguments(ENGINE, tasks.add_parser("correctness", help="answers against the converted model's own"))
    timed = tasks.add_parser("speed", help="prompts and decodes, original against converted")
    speed.add_arguments(timed)
    timed.add_argument("--compile", action="store_true", help="torch.compile, as vLLM does by default; starts slowly")
    timed.add_argument("--kernels", action="store_true", help="also profile the kernels of a decode step")
    timed.add_argument("--out", type=Path, default=Path("vllm-results"), help="folder for logs and JSON lines")
    arguments = parser.parse_args()
    if arguments.task == "correctness":
        return correctness.correctness(ENGINE, arguments)
    return speed.speed(HERE / "timing.py", arguments)


if __name__ == "__main__":
    sys.exit(main())
