"""Healing: speed against a plain loop, quality before and after, a control, one GPU against two.

    python benchmarks/heal all CONV50 CONV33 CONV25 --teacher ORIGINAL --data TRAIN --eval TEST --other CODE.txt --seconds 200

`all` does everything at once, on one or two GPUs, within --seconds: the text is prepared once for all runs; the first GPU
measures speed and then heals all but one of the conversions, the last GPU heals the middle one; at the end a few steps on one
GPU, by DDP and by FSDP2. The step size of its runs follows the time, so that they end where they should.

Every part can be run alone, too; `final` then takes --tokens. Each result is one line of JSON, on stdout and at the end of
--results; models are written to a temporary folder and deleted.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import end_to_end
import harness
import multi_gpu
import prepare_text
import short_runs
import speed
import torch

from mla_convert.core.units import parse_tokens

PARTS = {
    "text": prepare_text.main,
    "speed": speed.main,
    "race": short_runs.main,
    "final": end_to_end.main,
    "control": end_to_end.control,
    "processes": multi_gpu.main,
}
# Seconds kept free at the end: to measure what was healed, and for the steps on one GPU and on two.
MEASURING, STEPS = 25, 40


def everything(args):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    first, last = visible.split(",")[0], visible.split(",")[-1]
    end, running = time.time() + args.seconds, []

    def start(part, converted, *more, gpus=first, launch=(sys.executable,), env=None):
        given = ["--teacher", args.teacher, "--data", args.data, "--eval", args.eval, "--results", args.results,
                 "--work", args.work, "--length", args.length, "--step-tokens", args.step_tokens, "--windows", args.windows,
                 "--passkey-length", args.passkey_length, *(("--other", *args.other) if args.other else ()),
                 *(("--set", args.own) if args.own else ()), *(("--profile",) if args.profile else ()), *more]  # fmt: skip
        command = [*launch, os.path.dirname(os.path.abspath(__file__)), part, *converted, *given]
        with open(Path(args.work) / f"log-{len(running)}-{part}.txt", "wb") as log:
            running.append(subprocess.Popen([*map(str, command)], stderr=log,
                                            env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus} | (env or {})))  # fmt: skip
        return running[-1]

    def finish(process, name):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1, end - time.time()))
        if process.returncode != 0:
            process.kill()
            log = next(Path(args.work).glob(f"log-{running.index(process)}-*"))
            words = log.read_text(errors="replace")[-1500:]
            harness.emit(args, part=name, error=f"exit code {process.returncode}", stderr=words)

    middle = args.converted[len(args.converted) // 2]
    harness.signal(args, "began")
    tokens = ("--tokens", args.tokens)
    named = [(start("text", [middle], *tokens, gpus=last), "text"), (start("speed", [middle], "--quick"), "speed")]
    until = ("--until", end - MEASURING - STEPS)
    for folder in args.converted:
        own = {"gpus": last} if folder == middle else {}
        gate = "text" if folder == middle and first != last else "speed"
        named.append((start("final", [folder], *tokens, *until, "--gate", gate, **own), f"final {Path(folder).name}"))
    named.append((start("control", [middle], *tokens, "--steps", 100, gpus=last), "control"))
    both = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    several = [("one", {})]
    if first != last:
        pair = {"launch": both, "gpus": f"{first},{last}"}
        several += [("ddp", pair), ("fsdp2", {**pair, "env": multi_gpu.FSDP2})]
    # started early, for they take a while to load; each waits for its turn
    several = [(start("processes", [middle], *tokens, "--name", name, "--gate", name, "--steps", 16, **own), name)
               for name, own in several]  # fmt: skip
    for process, name in named:
        finish(process, name) if name.startswith("final") else None
    for process, name in several:
        harness.signal(args, name)
        finish(process, name)
    for process, name in named:
        finish(process, name) if not name.startswith("final") else None


def main():
    parser = argparse.ArgumentParser(
        prog="benchmarks/heal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["all", *PARTS])
    parser.add_argument("converted", nargs="+", help="converted folders")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True, help="text of the final figures")
    parser.add_argument("--other", nargs="*", default=[], help="more texts to measure on")
    parser.add_argument("--seconds", type=float, default=200, help="of `all`")
    parser.add_argument("--tokens", type=parse_tokens, default=40_000_000, help="of final figures; of `all`: at most")
    parser.add_argument("--steps", type=int, default=28, help="of the race, the control and several processes")
    parser.add_argument(
        "--try", dest="tries", nargs="*", default=short_runs.TRIES, help="the race's settings: lr=0.002,noise=0"
    )
    parser.add_argument("--set", dest="own", default="", help="settings of a final run, in the same words")
    parser.add_argument("--profile", action="store_true", help="speed: kernels by time as well")
    parser.add_argument("--quick", action="store_true", help="speed: the plain loop and the default alone")
    parser.add_argument("--until", type=float, help="final: seconds since the epoch at which training ends")
    parser.add_argument("--gate", help="wait until this part is done")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--step-tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--passkey-length", type=int, default=2048)
    parser.add_argument("--name", default="one", help="of a run of several processes")
    parser.add_argument("--results", default="heal-bench.jsonl")
    parser.add_argument("--work", help="temporary folder; deleted if not given")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        args.work = args.work or stack.enter_context(tempfile.TemporaryDirectory())
        {"all": everything, **PARTS}[args.part](args)


if __name__ == "__main__":
    main()
