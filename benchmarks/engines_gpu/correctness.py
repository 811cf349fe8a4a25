"""Answers of an engine on this GPU against the converted model's own."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

TOKENS, TOP = 24, 8
# Rounding of log-probabilities above which greedy tokens may differ. Rows of 4 bits reach it in float32 too: a code at a tie
# falls the other way, and later layers amplify that.
DECIDED = 1e-3


@dataclass(frozen=True)
class Engine:
    """The engine that is asked.

    Attributes:
        program: folder that `python` runs.
        settings: configurations: name, and what is asked of the engine.
        ask: its function in ask_engine.py.
        asked: asked in every setting.
        environment: variables, unless they are set.
    """

    program: Path
    settings: dict[str, dict[str, Any]]
    ask: Callable[[str, dict], dict]
    asked: dict[str, Any]
    environment: dict[str, str]


def own_answers(folder: Path, prompts: list[list[int]], dtype: torch.dtype, device: str) -> tuple[list, list]:
    """Log-probabilities (T-1, vocabulary) of each prompt by the converted model, and its greedy continuations."""
    from transformers import AutoModelForCausalLM

    import mla_convert  # noqa: F401  (lets transformers load the folder)

    os.environ["MLA_CONVERT_KERNEL"] = "sdpa"  # a reference that shares no kernel with the plugin, and compiles none
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    model.generation_config.eos_token_id = None
    logprobs, greedy = [], []
    with torch.no_grad():
        for ids in prompts:
            tokens = torch.tensor([ids], device=device)
            logprobs.append(model(tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1).cpu())
            made = model.generate(tokens, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
            greedy.append(made[0, len(ids) :].tolist())
    return logprobs, greedy


def differences(answers: list[list[dict]], exact: list[torch.Tensor]) -> tuple[float, float]:
    """Mean and largest difference of log-probabilities of the tokens that the engine named."""
    found = [
        abs(value - float(table[at, token]))
        for lines, table in zip(answers, exact, strict=True)
        for at, line in enumerate(lines)
        for token, value in line.items()
    ]
    return sum(found) / len(found), max(found)


def compare(engine: Engine, folder: Path, dtype: str, name: str, device: str) -> bool:
    """Compare a folder in one setting, and print the result; returns whether an answer was wrong."""
    for variable, value in engine.environment.items():
        os.environ.setdefault(variable, value)
    from transformers import AutoConfig

    begin, draw = time.perf_counter(), random.Random(1)
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    prompts = [[draw.randrange(3, vocabulary) for _ in range(length)] for length in (70, 33, 5, 150)]
    prompts.append([*prompts[-1][:128], 9, 8, 7])  # shares a prefix of two pages
    exact, greedy = own_answers(folder, prompts, torch.float64, device)
    rounded, _ = own_answers(folder, prompts, getattr(torch, dtype), device)
    asked = {
        "model_impl": "",
        "trust_remote_code": False,
        "dtype": dtype,
        "prompts": prompts,
        "tokens": TOKENS,
        "top": TOP,
    }
    found = engine.ask(str(folder), asked | engine.asked | engine.settings[name])
    named = [entry["logprobs"] for entry in found["prompts"]]
    mean, largest = differences(named, exact)
    # The converted model's own answers for the same tokens.
    own = [
        [{token: float(table[at, token]) for token in line} for at, line in enumerate(lines)]
        for lines, table in zip(named, rounded, strict=True)
    ]
    rounding, roundest = differences(own, exact)
    same = sum(e["greedy"] == own for e, own in zip(found["prompts"], greedy, strict=True))
    again = sum(e["greedy"] == e["greedy_from_cache"] for e in found["prompts"])
    cached = sum(e["cached_tokens"] for e in found["prompts"])
    alike = rounding > DECIDED or (same == again == len(prompts))
    ok = mean <= 1e-4 + 2 * rounding and alike
    print(
        f"{'right' if ok else 'WRONG'}: {folder.name}, {dtype}, {name}: log-probabilities differ by {mean:.1e} in the mean, "
        f"{largest:.1e} at most (own rounding {rounding:.1e} and {roundest:.1e}); greedy tokens the same for {same} of "
        f"{len(prompts)}, from cached prefixes ({cached} tokens) for {again}; {found['setting']}, "
        f"{time.perf_counter() - begin:.0f} s", flush=True,
    )  # fmt: skip
    return not ok


def correctness(engine: Engine, arguments: argparse.Namespace) -> bool:
    """Compare every folder in every setting, each in a process of its own; returns whether an answer was wrong."""
    cases = list(product(arguments.folders, arguments.dtype, arguments.settings))
    if len(cases) == 1:
        return compare(engine, *cases[0], arguments.device)

    def run(case: tuple[Path, str, str]) -> bool:
        command = [sys.executable, str(engine.program), "correctness", str(case[0]), "--dtype", case[1],
                   "--settings", case[2], "--device", arguments.device]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = done.stdout.splitlines()
        verdict = [line for line in lines if line.startswith(("right: ", "WRONG: "))]
        failed = f"WRONG: {case[0].name}, {case[1]}, {case[2]}: failed\n  " + "\n  ".join(lines[-12:])
        print(verdict[-1] if verdict else failed, flush=True)
        return done.returncode != 0

    with ThreadPoolExecutor(arguments.jobs) as pool:
        return any(list(pool.map(run, cases)))


def add_arguments(engine: Engine, parser: argparse.ArgumentParser) -> None:
    """Options of the task."""
    parser.add_argument("folders", nargs="+", type=Path, help="converted folders")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--settings", nargs="+", choices=list(engine.settings), default=list(engine.settings))
    parser.add_argument("--device", default="cuda", help="cpu: a dry run with a CPU build of the engine")
    parser.add_argument("--jobs", type=int, default=4, help="engines at a time; each takes a tenth of the memory")
