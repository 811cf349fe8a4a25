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
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import correctness
import speed


def main() -> bool:
    """Run a task; returns whether something was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    correctness.add_arguments(tasks.add_parser("correctness", help="answers against the converted model's own"))
    timed = tasks.add_parser("speed", help="prompts and decodes, original against converted")
    speed.add_arguments(timed)
    timed.add_argument("--out", type=Path, default=Path("vllm-results"), help="folder for logs and JSON lines")
    arguments = parser.parse_args()
    return (correctness.correctness if arguments.task == "correctness" else speed.speed)(arguments)


if __name__ == "__main__":
    sys.exit(main())
