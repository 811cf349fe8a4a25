"""SGLang on a GPU: correctness of converted models, and their speed against the original.

    python benchmarks/sglang_gpu correctness CONVERTED [CONVERTED ...]
    python benchmarks/sglang_gpu speed --at 1x16384 32x16384

Needs SGLang 0.5.17. For a machine without network, prepare.sh packs it and engines_gpu/assemble.sh unpacks it. Speed is measured
on random weights: each engine runs alone, with CUDA graphs for decodes, and prompts without.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "engines_gpu"), str(HERE.parents[1])]

import correctness
import speed

from mla_convert.publish.engines.ask_engine import ask_sglang


def backend() -> str | None:
    """Triton's attention for originals and exports, where SGLang would choose FlashAttention 3 and prepare.sh left it out."""
    found = importlib.util.find_spec("sgl_kernel")
    places = found.submodule_search_locations if found else None
    return None if any(list(Path(place).glob("flash_ops*")) for place in places or ()) else "triton"


# A small cache: engines start at the same time, and SGLang takes most of the memory by itself.
SMALL = {"max_total_tokens": 65536, "cuda_graph_max_bs_decode": 8}
ENGINE = correctness.Engine(
    HERE,
    {
        "eager": {"eager": True},
        "graphs": {"eager": False},
        "graphs, chunks, prefixes": {"eager": False, "chunk": 48, "prefix_caching": True},
        "as SGLang starts": {"eager": False, "prefix_caching": True},
    },
    ask_sglang,
    {"memory": 0.1, "options": SMALL, "backend": backend()},
    {},
)


def main() -> bool:
    """Run a task; returns whether something was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    asked = tasks.add_parser("correctness", help="answers against the converted model's own")
    correctness.add_arguments(ENGINE, asked)
    asked.set_defaults(dtype=["bfloat16", "float16"])  # SGLang's norms on a GPU take no float32
    timed = tasks.add_parser("speed", help="prompts and decodes, original against converted")
    speed.add_arguments(timed, ("auto",))
    timed.add_argument("--backend", default=backend(), help="--attention-backend of original and export")
    timed.add_argument("--out", type=Path, default=Path("sglang-results"), help="folder for logs and JSON lines")
    arguments = parser.parse_args()
    if arguments.task == "correctness":
        return correctness.correctness(ENGINE, arguments)
    return speed.speed(HERE / "timing.py", arguments)


if __name__ == "__main__":
    sys.exit(main())
