"""`mla-convert inspect`: properties of a checkpoint, and whether it can be converted."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mla_convert.cli.options import Quiet, Verbose
from mla_convert.cli.terminal import print_location, silence_libraries
from mla_convert.core.errors import InputError
from mla_convert.core.words import say

EXAMPLE = "mla-convert inspect ./my-model"


def inspect(
    path: Annotated[str, typer.Argument(help="Folder (source or converted), Hub id, .gguf file or recipe.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the findings as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Attention, RoPE, size and cache of PATH, and whether it can be converted (exit code 4 if not).

    For a converted folder: its rank, its source and the results in its report.
    """
    from mla_convert.core.recipes import build_config

    config = build_config({"source": path, "revision": revision})
    silence_libraries(quiet)
    from mla_convert.core.console import Terminal
    from mla_convert.pipeline.inspect import inspect_checkpoint, print_inspection

    try:
        findings = inspect_checkpoint(config.source, config.revision)
    except InputError as error:
        # A program that reads JSON gets the reason there; the exit code is the same.
        if json_:
            say(json.dumps({"name": path, "convertible": False, "reason": str(error)}, indent=2))
        raise
    if json_:
        say(json.dumps(findings.as_dict(), indent=2))
    else:
        console = Terminal()
        print_inspection(findings, console)
        print_location(config.source, findings.name, console)
