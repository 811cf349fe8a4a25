"""Does an engine answer from an exported folder as the converted model does? Log-probabilities and greedy tokens, compared."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mla_convert.core.errors import InputError, ResourceError, UsageError, one_line
from mla_convert.publish.engines import ask_engine
from mla_convert.publish.engines.export import EXPORT
from mla_convert.source.load_model import find_model, is_converted, load_model, load_tokenizer, model_config
from mla_convert.source.texts import load_text

ENGINES = ("vllm", "sglang", "transformers", "llama.cpp")
PROMPTS, LENGTH, TOKENS, TOP = 4, 64, 16, 20
# float32: largest difference of a log-probability, from our own model in float64: two float32 evaluations of one model each
# round, and may do so in opposite directions. Rounded weights: times what rounding our own model costs, and a little.
EXACT, SLACK = 1e-4, 2.0


@dataclass(frozen=True)
class Verdict:
    """What was found. Differences are of log-probabilities, from the converted model's in a higher precision.

    `own_rounding` is the converted model's own difference in `dtype`, of the kind that `limit` is for: the largest in float32,
    else the mean.
    """

    engine: str
    version: str
    path: str
    profile: str
    dtype: str
    positions: int
    max_difference: float
    mean_difference: float
    own_rounding: float
    top1_agreement: float
    greedy_same: int
    prompts: int
    limit: float
    ok: bool

    def as_dict(self) -> dict[str, Any]:
        """As `serve-check --json` prints it."""
        return asdict(self)

    def __str__(self) -> str:
        if self.dtype == "float32":
            rule = (
                f"largest difference at most {self.limit:g} and the same greedy tokens; float32 costs our own model "
                f"{self.own_rounding:.1e}"
            )
        else:
            rule = f"mean difference at most {self.limit:.2g}; bfloat16 costs our own model {self.own_rounding:.2g}"
        return (
            f"{self.engine} {self.version} ({self.path}), profile {self.profile}, {self.dtype}: "
            f"{'right' if self.ok else 'WRONG'}\n"
            f"log-probabilities of {self.positions} positions: largest difference {self.max_difference:.1e}, mean "
            f"{self.mean_difference:.1e}; likeliest token the same at {self.top1_agreement:.1%}; greedy continuation the same for "
            f"{self.greedy_same} of {self.prompts} prompts\n"
            f"asked for: {rule}"
        )


@dataclass(frozen=True)
class EngineRequest:
    """How the engine is run. `python` has it installed; `gguf` and `server` are llama.cpp's model file and program."""

    engine: str
    python: str | None = None
    dtype: str | None = None
    model_impl: str = ""
    trust_remote_code: bool = False
    gguf: Path | None = None
    server: str | None = None
    limit: float | None = None


def serve_check(folder: Path, how: EngineRequest, against: Path | None = None) -> Verdict:
    """Ask the engine, ask the converted model, compare.

    :param folder: an exported folder.
    :param against: the converted folder that it was exported from; None: looked for beside it, by the name it notes.

    Raises:
        UsageError, InputError: nothing that this engine serves, or nothing to compare with.
        ResourceError: the engine is not installed, or fails.
    """
    if how.engine not in ENGINES:
        raise UsageError(f"engine {how.engine!r} is none of {', '.join(ENGINES)}")
    facts = _facts(folder)
    _check_pair(facts["profile"], how)
    original = find_model(str(_original(folder, facts, against)))
    if not is_converted(model_config(original)):
        raise InputError(
            f"{original.label} is no converted model: give the one that {folder} was exported from as --against"
        )
    prompts = fixed_prompts(load_tokenizer(original))
    dtype = _dtype(facts, how)
    answers = _ask(folder, how, prompts, facts["dtype"] if dtype == "gguf" else dtype)
    own, higher = (torch.float32, torch.float64) if dtype == "float32" else (torch.bfloat16, torch.float32)
    exact, greedy = _own_answers(original, prompts, higher)
    rounded, _ = _own_answers(original, prompts, own, continued=False)
    rounding = _compare(_as_entries(rounded), exact)[0 if dtype == "float32" else 1]
    largest, mean, agreement = _compare([entry["logprobs"] for entry in answers["prompts"]], exact)
    same = sum(found["greedy"] == own for found, own in zip(answers["prompts"], greedy, strict=True))
    limit = (EXACT if dtype == "float32" else EXACT + SLACK * rounding) if how.limit is None else how.limit
    ok = (largest <= limit and same == len(prompts)) if dtype == "float32" else mean <= limit
    return Verdict(how.engine, answers["version"], answers["path"], facts["profile"], dtype, sum(map(len, exact)), largest,
                   mean, rounding, agreement, same, len(prompts), limit, ok)  # fmt: skip


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
        return {key: facts[key] for key in ("profile", "dtype", "source")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{folder} has no {EXPORT} that can be read: give a folder that `mla-convert export` wrote"
        ) from error


def _check_pair(profile: str, how: EngineRequest) -> None:
    stock = how.engine == "transformers" or how.model_impl == "transformers"
    if profile == "engine" and stock:
        raise UsageError(
            "profile engine is not for transformers, whose latent norm has its own epsilon: export with --profile portable"
        )
    if profile == "hf-code" and how.engine in ("sglang", "llama.cpp"):
        raise UsageError(f"profile hf-code is for transformers and vLLM, whose code {how.engine} does not run")
    if profile == "hf-code" and not how.trust_remote_code:
        raise UsageError("profile hf-code runs the Python file in the folder: read it, then give --trust-remote-code")
    if how.engine == "llama.cpp" and how.gguf is None:
        raise UsageError(
            "llama.cpp reads a .gguf file: make one with its converter (docs/guides/serve.md), and give it as --gguf"
        )
    if how.gguf is not None and not how.gguf.is_file():
        raise InputError(f"{how.gguf} not found: give the .gguf file made from this folder")


def _original(folder: Path, facts: dict[str, Any], against: Path | None) -> Path:
    if against is not None:
        return against
    beside = folder.resolve().parent / str(facts["source"])
    if not beside.is_dir():
        raise UsageError(f"{facts['source']}, which {folder} was exported from, is not beside it: give it as --against")
    return beside


def _dtype(facts: dict[str, Any], how: EngineRequest) -> str:
    if how.engine == "llama.cpp":
        return "gguf"
    dtype = how.dtype or facts["dtype"]
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"dtype {dtype!r} is none of float32, bfloat16: in float16 the exported latents underflow")
    return dtype


def fixed_prompts(tokenizer: Any) -> list[list[int]]:
    """PROMPTS pieces of LENGTH tokens of the packaged evaluation text."""
    text, _ = load_text("package:mla_demo/evaluation.txt.gz", "evaluation")
    ids = tokenizer(text[: 40 * PROMPTS * LENGTH])["input_ids"]
    if len(ids) < PROMPTS * LENGTH:
        raise InputError(f"the tokenizer makes only {len(ids)} tokens of the packaged text: nothing to ask with")
    return [ids[start : start + LENGTH] for start in range(0, PROMPTS * LENGTH, LENGTH)]


def _ask(folder: Path, how: EngineRequest, prompts: list[list[int]], dtype: str) -> dict[str, Any]:
    """The engine's answers, by `ask_engine.py` in its own interpreter."""
    with tempfile.TemporaryDirectory() as work:
        asked: dict[str, Any] = {"prompts": prompts, "tokens": TOKENS, "top": TOP, "dtype": dtype,
                                 "trust_remote_code": how.trust_remote_code, "model_impl": how.model_impl}  # fmt: skip
        if how.engine == "llama.cpp":
            asked |= {"server": _server(how), "port": _free_port(), "log": f"{work}/server.log"}
        questions, answers = Path(work) / "questions.json", Path(work) / "answers.json"
        questions.write_text(json.dumps(asked), encoding="utf-8")
        model = os.path.abspath(how.gguf if how.engine == "llama.cpp" else folder)
        python = shutil.which(how.python) if how.python else sys.executable
        if python is None:
            raise ResourceError(
                f"{how.python} is no interpreter: give the python of the environment that has {how.engine}"
            )
        command = [os.path.abspath(python), ask_engine.__file__, how.engine, model, str(questions), str(answers)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=_environment(how.engine))
        except OSError as error:
            raise ResourceError(f"{command[0]} cannot be run: {error.strerror}") from error
        if done.returncode or not answers.is_file():
            raise ResourceError(f"{how.engine} could not be asked: {_last_words(done.stderr) or done.returncode}")
        found = json.loads(answers.read_text(encoding="utf-8"))
    for entry in found["prompts"]:
        entry["logprobs"] = [{int(token): value for token, value in line.items()} for line in entry["logprobs"]]
    return found


def _environment(engine: str) -> dict[str, str]:
    own = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if engine == "vllm":
        own |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    return os.environ | own


def _last_words(stderr: str) -> str:
    """The error at the end of what a program says when it fails."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0] or line.startswith("llama-server")]
    return one_line(RuntimeError((errors or lines or [""])[-1]))


def _server(how: EngineRequest) -> str:
    found = shutil.which(how.server or "llama-server") or (None if how.server else shutil.which("llama-cpp-server"))
    if found is None:
        raise ResourceError(f"{how.server or 'llama-server'} is not on the path: install llama.cpp, or give --server")
    return os.path.abspath(found)  # not resolved: a link may be what finds the libraries beside it


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@torch.no_grad()
def _own_answers(
    place: Any, prompts: list[list[int]], dtype: torch.dtype, continued: bool = True
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The converted model's log-probabilities (T-1, vocabulary) of each prompt, and its greedy continuations if asked for.

    float64 is that of the weights, projections and attention: the library's norms and RoPE tables are float32 throughout.
    """
    model = load_model(place, dtype, torch.device("cpu"))
    model.generation_config.eos_token_id = None
    logprobs, greedy = [], []
    for ids in prompts:
        tokens = torch.tensor([ids])
        logprobs.append(model(tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1))
        if continued:
            made = model.generate(tokens, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
            greedy.append(made[0, len(ids) :].tolist())
    return logprobs, greedy


def _as_entries(logprobs: list[torch.Tensor]) -> list[list[dict[int, float]]]:
    """Answers of our own as an engine gives them: the TOP likeliest of each position."""
    tops = [table.topk(min(TOP, table.shape[1])) for table in logprobs]
    return [
        [
            dict(zip(index.tolist(), value.tolist(), strict=True))
            for value, index in zip(top.values, top.indices, strict=True)
        ]
        for top in tops
    ]


def _compare(answers: list[list[dict[int, float]]], exact: list[torch.Tensor]) -> tuple[float, float, float]:
    """Largest and mean difference of log-probabilities, and the share of positions with the same likeliest token."""
    differences, agree = [], []
    for lines, table in zip(answers, exact, strict=True):
        for line, own in zip(lines, table, strict=True):
            tokens = torch.tensor(list(line))
            found = torch.tensor(list(line.values()), dtype=torch.float64)
            differences.append((found - own[tokens]).abs())
            agree.append(max(line, key=line.__getitem__) == int(own.argmax()))
    every = torch.cat(differences)
    if not torch.isfinite(every).all():
        return float("inf"), float("inf"), sum(agree) / len(agree)
    return float(every.max()), float(every.mean()), sum(agree) / len(agree)
