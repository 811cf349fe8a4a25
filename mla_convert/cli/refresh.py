"""`mla-convert refresh`: give a folder of an earlier version the current Python files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mla_convert.cli.options import Quiet, Verbose
from mla_convert.cli.terminal import silence_libraries
from mla_convert.core.words import say

EXAMPLE = "mla-convert refresh llama-8b-mla"


def refresh(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a converted, healed or exported model.", show_default=False)
    ],
    accept: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A file in DIR that was changed on purpose (README.md, a tokenizer or licence file): it is kept, and its "
            "checksum is renewed. A Python file of the model: it is replaced by this version's. May be given more than once.",
            show_default=False,
        ),
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the names of the written files as JSON on stdout.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Replace the Python files in DIR by this version's, and record a checksum of every file; weights are not changed."""
    silence_libraries(quiet)
    from mla_convert.pipeline.refresh import refresh as refresh_folder

    refreshed = refresh_folder(folder, accept or ())
    if json_:
        say(json.dumps(refreshed.as_dict(), indent=2))
    elif refreshed.written:
        say(f"{folder}: written anew: {', '.join(refreshed.written)}")
    else:
        say(f"{folder}: nothing to do: its files are this version's, and each is under checksum")
