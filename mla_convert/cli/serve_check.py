"""`mla-convert serve-check`: does an engine answer from an exported folder as the converted model does?"""

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
        Path, typer.Argument(metavar="DIR", help="Folder that `export` wrote, on a disk.", show_default=False)
    ],
    engine: Annotated[str, typer.Option(help="vllm, sglang, transformers or llama.cpp.", show_default=False)],
    against: Annotated[
        Path | None,
        typer.Option(
            help="The converted model that DIR was exported from. Default: looked for beside DIR, by the name it had."
        ),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter of the environment that has the engine. Default: this one.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as DIR is stored.")] = None,
    model_impl: Annotated[
        str, typer.Option(help="vLLM's option of that name: transformers for its transformers backend.")
    ] = "",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the engine run the Python file in DIR (profile hf-code).")
    ] = False,
    gguf: Annotated[Path | None, typer.Option(help="For llama.cpp: the .gguf file made from DIR.")] = None,
    server: Annotated[str | None, typer.Option(help="For llama.cpp: its llama-server. Default: on the path.")] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            help="Difference of log-probabilities that is allowed: float32 the largest (default 1e-4, from our own model in "
            "float64), else the mean (default: twice what bfloat16 costs our own model). Quantised weights need one of your own."
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Ask an engine and the converted model the same, and compare. Exit code 3: the engine answers something else."""
    silence_libraries(True)
    from mla_convert.publish.engines.serve_check import EngineRequest
    from mla_convert.publish.engines.serve_check import serve_check as check

    how = EngineRequest(engine, python, dtype, model_impl, trust_remote_code, gguf, server, limit)
    found = check(folder, how, against)
    if json_:
        say(json.dumps(found.as_dict(), indent=2))
    elif not quiet:
        say(str(found))
    if not found.ok:
        raise GateFailed(
            f"{engine} answers other than the converted model: log-probabilities differ by {found.mean_difference:.1e} in the "
            f"mean, {found.max_difference:.1e} at most"
        )
