"""`mla-convert serve-check`: compare an engine's answers with those of the converted model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mla_convert.cli.options import Quiet, Verbose
from mla_convert.cli.terminal import silence_libraries
from mla_convert.core.errors import GateFailed
from mla_convert.core.words import say

EXAMPLE = "mla-convert serve-check llama-8b-vllm --engine vllm --against llama-8b-mla"


def serve_check(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder that `export` wrote; for the plugins of vLLM and SGLang, the converted folder itself.",
            show_default=False,
        ),
    ],
    engine: Annotated[str, typer.Option(help="vllm, sglang, transformers or llama.cpp.", show_default=False)],
    against: Annotated[
        Path | None,
        typer.Option(
            help="The converted model that DIR was exported from. Default: the folder of its name beside DIR."
        ),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(help="Python interpreter of the environment that has the engine. Default: the running one."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as DIR is stored.")] = None,
    model_impl: Annotated[
        str, typer.Option(help="vLLM's option of that name: transformers for its transformers backend.")
    ] = "",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the engine run the Python file in DIR (profile hf-code).")
    ] = False,
    eager: Annotated[
        bool, typer.Option("--eager", help="For vLLM and SGLang: no CUDA graphs and no compilation.")
    ] = False,
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="For vLLM and SGLang: ask a second time, so that it starts from cached prefixes.",
        ),
    ] = True,
    chunk: Annotated[
        int,
        typer.Option(
            min=0,
            help="For vLLM and SGLang: most tokens of a step, so that prompts are read in chunks. 0: its default.",
        ),
    ] = 48,
    gguf: Annotated[Path | None, typer.Option(help="For llama.cpp: the .gguf file made from DIR.")] = None,
    server: Annotated[
        str | None, typer.Option(help="For llama.cpp: its llama-server. Default: the one on the path.")
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            help="Largest allowed difference of log-probabilities: in float32 at any token (from our own model in float64; "
            "default: 1e-4, or twice the rounding of our own model in float32 if that is more), else in the mean (default: "
            "twice the rounding of our own model in bfloat16). Quantised weights need their own."
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Give an engine and the converted model the same prompts, and compare. Exit code 3: the answers differ."""
    silence_libraries(True)
    from mla_convert.publish.engines.serve_check import EngineRequest
    from mla_convert.publish.engines.serve_check import serve_check as check

    request = EngineRequest(
        engine, python, dtype, model_impl, trust_remote_code, gguf, server, limit, eager, prefix_caching, chunk
    )
    verdict = check(folder, request, against)
    # The verdict is printed before the gate fails, because a failed gate leaves as an exception.
    if json_:
        say(json.dumps(verdict.as_dict(), indent=2))
    elif not quiet:
        say(str(verdict))
    if not verdict.ok:
        raise GateFailed(
            f"{engine} answers other than the converted model: log-probabilities differ by {verdict.mean_difference:.1e} in the "
            f"mean, {verdict.max_difference:.1e} at most"
        )
