"""`mla-convert report`: the page of a conversion, made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mla_convert.commands.shared import Verbose
from mla_convert.errors import InputError
from mla_convert.words import say

EXAMPLE = "mla-convert report llama-8b-mla --html llama.html"


def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder of a converted model, or its report.json.", show_default=False),
    ],
    html: Annotated[
        Path | None,
        typer.Option(help="File to write. Default: report.html in the folder.", show_default=False),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report itself as JSON on stdout.")] = False,
    verbose: Verbose = False,
) -> None:
    """Make report.html anew from the report.json in DIR: plots of cache, perplexity, planes and layers, in one file."""
    from mla_convert.figures import read_report
    from mla_convert.page import PAGE, write_page

    content = read_report(folder)
    file = html or (folder if folder.is_dir() else folder.parent) / PAGE
    if file.is_dir():
        raise InputError(f"--html {file} is a folder: give a file")
    write_page(content, file)
    say(json.dumps(content, indent=2) if json_ else str(file))
