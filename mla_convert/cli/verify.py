"""`mla-convert verify`: check that a converted folder is complete and unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mla_convert.cli.options import Quiet, Verbose
from mla_convert.cli.terminal import silence_libraries
from mla_convert.core.words import say

EXAMPLE = "mla-convert verify llama-8b-mla"


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a converted model.", show_default=False)],
    run: Annotated[
        bool,
        typer.Option(
            "--run", help="Also load the model and generate with and without a cache; exit code 1 if these differ."
        ),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check every byte of a converted or exported folder, tensor names, shapes, values. Exit code 4 names the first fault."""
    silence_libraries(quiet)
    from mla_convert.core.sums import CorruptCheckpoint
    from mla_convert.core.units import human_bytes
    from mla_convert.write.verify import verify as verify_folder

    try:
        found = verify_folder(folder)
    except CorruptCheckpoint as fault:
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
    tried = _tried(folder) if run else None
    if json_:
        content = {
            "ok": True,
            "folder": str(folder),
            "shards": found.shards,
            "tensors": found.tensors,
            "bytes": found.bytes,
            "files": found.files,
            "note": found.note,
            **({"self_check": tried} if tried else {}),
        }
        say(json.dumps(content, indent=2))
    else:
        say(
            f"{folder}: {found.shards} shards, {found.tensors} tensors, {human_bytes(found.bytes)}: checksums, names, "
            f"shapes and values are right"
        )
        if found.note:
            say(found.note)
        if tried:
            part = (
                ""
                if tried["layers"] == tried["of_layers"]
                else f"the first {tried['layers']} of {tried['of_layers']} layers, "
            )
            say(
                f"generates the same with a dynamic and a static cache as without ({part}transformers "
                f"{tried['versions']['transformers']}, torch {tried['versions']['torch']}, {tried['seconds']} s)"
            )
            if not tried["own_code"]:
                say("its Python files are not this version's and were not run: `mla-convert refresh` renews them")


def _tried(folder: Path) -> dict[str, Any]:
    """Result of the self-check of a folder.

    Raises:
        UsageError: An export that transformers would misread.
    """
    from mla_convert.core.errors import UsageError
    from mla_convert.source.load_model import EXPORTED
    from mla_convert.source.source import load_config
    from mla_convert.write.selfcheck import own_code, self_check

    exported = getattr(load_config(folder, folder.name), EXPORTED, None)
    if isinstance(exported, dict) and exported.get("profile") == "engine":
        raise UsageError(
            f"{folder} is exported for engines, which transformers would misread: try it with `serve-check`"
        )
    code = own_code(folder)
    if isinstance(exported, dict) and exported.get("profile") == "hf-code" and not code:
        raise UsageError(f"{folder} has Python files that are not this version's: `mla-convert refresh {folder}` first")
    return {**self_check(folder), "own_code": bool(code or not list(folder.glob("*.py")))}
