"""`mla-convert report`: make the page of a conversion again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mla_convert.cli.options import Verbose
from mla_convert.core.errors import InputError
from mla_convert.core.words import say

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
    """Make report.html again from the report.json in DIR: plots of cache, perplexity, planes and layers, in one file."""
    from mla_convert.core.report_file import PAGE, read_report
    from mla_convert.report.html.page import page_text, write_page
    from mla_convert.write.revise import replace_files

    content = read_report(folder)
    place = folder if folder.is_dir() else folder.parent
    file = html or place / PAGE
    if file.is_dir():
        raise InputError(f"--html {file} is a folder: give a file")
    # A page in the model's own folder is listed in SHA256SUMS, where its line has to change with it.
    if file.name == PAGE and os.path.realpath(file.parent) == os.path.realpath(place):
        replace_files(place, {PAGE: page_text(content)})
    elif file.exists() and not file.is_file():  # /dev/stdout, say
        file.write_text(page_text(content), encoding="utf-8")
    else:
        # A link is written through, not replaced.
        write_page(content, Path(os.path.realpath(file)))
    say(content.text().rstrip() if json_ else str(file))
