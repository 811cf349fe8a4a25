"""What healing gives and takes: speed against a plain loop, settings raced, final figures, a control, one GPU against two.

    python benchmarks/heal all CONVERTED... --teacher ORIGINAL --data TRAIN --eval TEST --other CODE.txt --tokens 20M

Every part can be run alone. Each result is one line of JSON, on stdout and at the end of --results; models are written to a
temporary folder and deleted. `all` runs each part as a process of its own and survives the failure of one.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile

import common
import final
import processes
import race
import speed
import torch

from mla_convert.amounts import parse_tokens

PARTS = {
    "speed": speed.main,
    "race": race.main,
    "final": final.main,
    "control": final.control,
    "processes": processes.main,
}


def everything(args):
    def run(part, *more, converted=args.converted, launch=(sys.executable,), env=None):
        given = ["--teacher", args.teacher, "--data", args.data, "--eval", args.eval, "--results", args.results,
                 "--work", args.work, "--length", args.length, "--step-tokens", args.step_tokens, "--windows", args.windows,
                 *(("--other", *args.other) if args.other else ()), *more]  # fmt: skip
        command = [*launch, os.path.dirname(os.path.abspath(__file__)), part, *converted, *given]
        done = subprocess.run([*map(str, command)], env=os.environ | (env or {}))
        if done.returncode:
            common.emit(args, part=part, error=f"exit code {done.returncode}")

    one = args.converted[len(args.converted) // 2 :][:1]
    run("speed", converted=one)
    run("race", converted=one)
    for folder in args.converted:
        run("final", "--tokens", args.tokens, "--passkey-length", args.passkey_length, converted=[folder])
    run("control", "--tokens", args.tokens, converted=one)
    run("processes", "--name", "one", converted=one)
    if torch.cuda.device_count() > 1:
        both = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
        run("processes", "--name", "ddp", launch=both, converted=one)
        run("processes", "--name", "fsdp2", launch=both, env=processes.FSDP2, converted=one)


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
    parser.add_argument("--tokens", type=parse_tokens, default=20_000_000, help="of final figures and control")
    parser.add_argument("--steps", type=int, default=28, help="of the race and of several processes")
    parser.add_argument(
        "--try", dest="tries", nargs="*", default=race.TRIES, help="the race's settings: lr=0.002,noise=0"
    )
    parser.add_argument("--set", dest="own", default="", help="settings of a final run, in the same words")
    parser.add_argument("--profile", action="store_true", help="speed: kernels by time as well")
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
