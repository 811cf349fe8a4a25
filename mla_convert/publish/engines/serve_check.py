"""Comparison of a serving engine's answers with the converted model's: log-probabilities and tokens.

The engine serves an exported folder, or, with a plugin (vLLM, SGLang), the converted folder itself.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
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
# Tokens of a step: fewer than a prompt has, so that prompts are read in chunks.
CHUNK = 48
# Stands in for a profile where an engine's plugin serves the converted folder.
PLUGIN = "plugin"
# float32: largest difference of a log-probability from the converted model in float64, EXACT or SLACK times that of the converted
# model in float32 (a second evaluation may round in the opposite direction; some models cost more than EXACT on some processors).
# bfloat16: the mean difference may be SLACK times that of the converted model in bfloat16, plus EXACT. The mean also decides where
# float32 costs the converted model more than DECIDED: a code of a quantised row at a tie falls the other way, and later layers
# amplify that.
EXACT, SLACK, DECIDED = 1e-4, 2.0, 1e-2


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison. Differences are of log-probabilities, from the converted model's in a higher precision.

    `own_rounding` is the converted model's own difference in `dtype`, of the kind that `limit` applies to: the mean if `by_mean`,
    else the largest one, and greedy tokens must agree too. `setting` is the configuration that the engine answered with, where
    it says (`vllm_setting`, `sglang_setting`); `cached_same` counts prompts whose continuation was the same again from cached
    prefixes, of `cached_tokens` tokens.
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
    by_mean: bool
    top1_agreement: float
    greedy_same: int
    prompts: int
    limit: float
    ok: bool
    setting: dict[str, Any] = field(default_factory=dict)
    cached_same: int = 0
    cached_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For `serve-check --json`."""
        return asdict(self)

    def __str__(self) -> str:
        """The result in three lines, or four."""
        own = f"{self.dtype} costs our own model"
        if self.by_mean:
            rule = f"mean difference at most {self.limit:.2g}; {own} {self.own_rounding:.2g}"
        else:
            rule = (
                f"largest difference at most {self.limit:.2g} and the same greedy tokens; {own} {self.own_rounding:.1e}"
            )
        return (
            f"{self.engine} {self.version} ({self.path}), profile {self.profile}, {self.dtype}: "
            f"{'right' if self.ok else 'WRONG'}\n"
            f"log-probabilities of {self.positions} positions: largest difference {self.max_difference:.1e}, mean "
            f"{self.mean_difference:.1e}; likeliest token the same at {self.top1_agreement:.1%}; greedy continuation the same for "
            f"{self.greedy_same} of {self.prompts} prompts\n"
            f"asked for: {rule}{self._served()}"
        )

    def _served(self) -> str:
        """A line about the engine's configuration."""
        if not self.setting:
            return ""
        s = self.setting
        prefixes = "prefix caching off"
        if s["prefix_caching"]:
            prefixes = (
                f"prefix caching on ({self.cached_tokens} tokens read from it, the same continuation for "
                f"{self.cached_same} of {self.prompts})"
            )
        chunks = f"prompts in chunks of {s['chunk']}" if s["chunk"] else "whole prompts"
        widths = ", ".join(map(str, s["cache_widths"]))
        cache = s["cache_dtype"] + (f" of {widths} numbers" if widths else "")
        return f"\nserved by: backend {s['backend']}, cache {cache}, {prefixes}, {chunks}, CUDA graphs {s['graphs']}"


@dataclass(frozen=True)
class EngineRequest:
    """The way in which the engine is run.

    `python`: interpreter of the environment that has the engine; `gguf` and `server`: llama.cpp's model file and program;
    `limit`: largest difference, instead of the default; `eager`, `prefix_caching` and `chunk` are for vLLM and SGLang: no CUDA
    graphs and no compilation, the prompts a second time from cached prefixes, and most tokens of a step (0 for the default).
    """

    engine: str
    python: str | None = None
    dtype: str | None = None
    model_impl: str = ""
    trust_remote_code: bool = False
    gguf: Path | None = None
    server: str | None = None
    limit: float | None = None
    eager: bool = False
    prefix_caching: bool = True
    chunk: int = CHUNK


def serve_check(folder: Path, how: EngineRequest, against: Path | None = None) -> Verdict:
    """Compare an engine's answers with the converted model's.

    Args:
        folder: an exported folder, or a converted one for a plugin.
        how: the engine and its options.
        against: the converted folder that it was exported from; None: the folder beside it of the name in export.json.

    Raises:
        UsageError, InputError: the engine does not serve this folder, or there is no converted folder.
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
    # The reference is a precision above the tested one, whose own rounding then sets the limit.
    own, higher = (torch.float32, torch.float64) if dtype == "float32" else (torch.bfloat16, torch.float32)
    exact, greedy = _own_answers(original, prompts, higher)
    rounded, _ = _own_answers(original, prompts, own, continued=False)
    own_largest, own_mean, _ = _compare(_as_entries(rounded), exact)
    # Rounding to bfloat16 alone can change a greedy token, and so can that of quantised rows.
    by_mean = dtype != "float32" or own_largest > DECIDED
    rounding = own_mean if by_mean else own_largest
    largest, mean, agreement = _compare([entry["logprobs"] for entry in answers["prompts"]], exact)
    same = sum(found["greedy"] == own for found, own in zip(answers["prompts"], greedy, strict=True))
    allowed = EXACT + SLACK * rounding if by_mean else max(EXACT, SLACK * rounding)
    limit = allowed if how.limit is None else how.limit
    again = sum(found["greedy"] == found.get("greedy_from_cache", found["greedy"]) for found in answers["prompts"])
    ok = mean <= limit if by_mean else largest <= limit and same == again == len(prompts)
    cached = sum(found.get("cached_tokens", 0) for found in answers["prompts"])
    return Verdict(how.engine, answers["version"], answers["path"], facts["profile"], dtype, sum(map(len, exact)), largest,
                   mean, rounding, by_mean, agreement, same, len(prompts), limit, ok, answers.get("setting", {}), again,
                   cached)  # fmt: skip


def _facts(folder: Path) -> dict[str, Any]:
    """Profile, dtype and source of an exported folder; a converted folder is its own source."""
    if (folder / "config.json").is_file() and not (folder / EXPORT).exists():
        config = model_config(find_model(str(folder)))
        if is_converted(config):
            dtype = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
            return {"profile": PLUGIN, "dtype": dtype, "source": folder.resolve().name}
    try:
        facts = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
        return {key: facts[key] for key in ("profile", "dtype", "source")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{folder} has no {EXPORT} that can be read: give a folder that `mla-convert export` wrote"
        ) from error


def _check_pair(profile: str, how: EngineRequest) -> None:
    if profile == PLUGIN and how.engine not in ("vllm", "sglang"):
        raise UsageError(
            f"only vLLM and SGLang have a plugin for converted folders: `mla-convert export` one for {how.engine}"
        )
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
        why = "" if facts["profile"] == PLUGIN else ": in float16 the exported latents underflow"
        raise UsageError(f"dtype {dtype!r} is none of float32, bfloat16{why}")
    return dtype


def fixed_prompts(tokenizer: Any) -> list[list[int]]:
    """PROMPTS pieces of LENGTH tokens of the packaged evaluation text."""
    text, _ = load_text("package:mla_demo/evaluation.txt.gz", "evaluation")
    # The text is longer than so many tokens need, and not all of it is tokenised.
    ids = tokenizer(text[: 40 * PROMPTS * LENGTH])["input_ids"]
    if len(ids) < PROMPTS * LENGTH:
        raise InputError(f"the tokenizer makes only {len(ids)} tokens of the packaged text: nothing to ask with")
    return [ids[start : start + LENGTH] for start in range(0, PROMPTS * LENGTH, LENGTH)]


def _ask(folder: Path, how: EngineRequest, prompts: list[list[int]], dtype: str) -> dict[str, Any]:
    """The engine's answers, from `ask_engine.py` in the engine's interpreter."""
    with tempfile.TemporaryDirectory() as work:
        asked: dict[str, Any] = {"prompts": prompts, "tokens": TOKENS, "top": TOP, "dtype": dtype,
                                 "trust_remote_code": how.trust_remote_code, "model_impl": how.model_impl,
                                 "eager": how.eager, "prefix_caching": how.prefix_caching, "chunk": how.chunk}  # fmt: skip
        if how.engine == "llama.cpp":
            asked |= {"server": _server(how), "port": _free_port(), "log": f"{work}/server.log"}
        questions, answers = Path(work) / "questions.json", Path(work) / "answers.json"
        questions.write_text(json.dumps(asked), encoding="utf-8")
        model = os.path.abspath(how.gguf if how.engine == "llama.cpp" and how.gguf else folder)
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
        given = json.loads(answers.read_text(encoding="utf-8"))
    for entry in given["prompts"]:
        # Keys of JSON are strings.
        entry["logprobs"] = [{int(token): value for token, value in line.items()} for line in entry["logprobs"]]
    return given


def _environment(engine: str) -> dict[str, str]:
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if engine == "vllm":
        quiet |= {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        }
    return os.environ | quiet


def _last_words(stderr: str) -> str:
    """The last error in a failed program's stderr."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0] or line.startswith("llama-server")]
    return one_line(RuntimeError((errors or lines or [""])[-1]))


def _server(how: EngineRequest) -> str:
    found = shutil.which(how.server or "llama-server") or (None if how.server else shutil.which("llama-cpp-server"))
    if found is None:
        raise ResourceError(f"{how.server or 'llama-server'} is not on the path: install llama.cpp, or give --server")
    return os.path.abspath(found)  # not resolved: the program may find its libraries by the link's folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@torch.no_grad()
def _own_answers(
    place: Any, prompts: list[list[int]], dtype: torch.dtype, continued: bool = True
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The converted model's log-probabilities (T-1, vocabulary) of each prompt, and its greedy continuations.

    `dtype` is that of weights, projections and attention; transformers' norms and RoPE tables are always float32. If not
    `continued`, there are no continuations.
    """
    model: Any = load_model(place, dtype, torch.device("cpu"))
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
    """Log-probabilities in the form of an engine's answers: the TOP most likely tokens of each position."""
    tops = [table.topk(min(TOP, table.shape[1])) for table in logprobs]
    return [
        [
            dict(zip(index.tolist(), value.tolist(), strict=True))
            for value, index in zip(top.values, top.indices, strict=True)
        ]
        for top in tops
    ]


def _compare(answers: list[list[dict[int, float]]], exact: list[torch.Tensor]) -> tuple[float, float, float]:
    """Largest and mean difference of log-probabilities, and the fraction of positions with the same most likely token."""
    differences, agree = [], []
    for lines, table in zip(answers, exact, strict=True):
        for line, expected in zip(lines, table, strict=True):
            tokens = torch.tensor(list(line))
            answered = torch.tensor(list(line.values()), dtype=torch.float64)
            differences.append((answered - expected[tokens]).abs())
            agree.append(max(line, key=line.__getitem__) == int(expected.argmax()))
    every = torch.cat(differences)
    if not torch.isfinite(every).all():
        return float("inf"), float("inf"), sum(agree) / len(agree)
    return float(every.max()), float(every.mean()), sum(agree) / len(agree)
