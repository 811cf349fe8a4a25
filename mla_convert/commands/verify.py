"""`mla-convert verify`: is a converted folder whole?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mla_convert.commands.shared import Quiet, Verbose, silence_libraries
from mla_convert.words import say

EXAMPLE = "mla-convert verify llama-8b-mla"


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a converted model.", show_default=False)],
    json_: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a converted folder: checksums, tensor names, shapes, values. Exit code 4 names the first fault."""
    silence_libraries(quiet)
    from mla_convert.report import human_bytes
    from mla_convert.verify import Fault
    from mla_convert.verify import verify as verify_folder

    try:
        found = verify_folder(folder)
    except Fault as fault:
        if json_:
            content = {
                "ok": False,
                "folder": str(folder),
                "file": fault.file,
                "tensor": fault.tensor,
                "fault": str(fault),
            }
            say(json.dumps(content, indent=2))
        raise
    if json_:
        content = {
            "ok": True,
            "folder": str(folder),
            "shards": found.shards,
            "tensors": found.tensors,
            "bytes": found.bytes,
        }
        say(json.dumps(content, indent=2))
    else:
        say(
            f"{folder}: {found.shards} shards, {found.tensors} tensors, {human_bytes(found.bytes)}: checksums, names, "
            f"shapes and values are right"
        )
