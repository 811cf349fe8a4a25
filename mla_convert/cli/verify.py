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
        verified = verify_folder(folder)
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
    checked = _self_check(folder) if run else None
    if json_:
        content = {"ok": True, "folder": str(folder), "shards": verified.shards, "tensors": verified.tensors,
                   "bytes": verified.bytes, "files": verified.files, "note": verified.note}  # fmt: skip
        say(json.dumps(content | ({"self_check": checked} if checked else {}), indent=2))
        return
    say(
        f"{folder}: {verified.shards} shards, {verified.tensors} tensors, {human_bytes(verified.bytes)}: checksums, names, "
        f"shapes and values are right"
    )
    if verified.note:
        say(verified.note)
    if checked:
        _print_self_check(checked)


def _print_self_check(checked: dict[str, Any]) -> None:
    layers, total, versions = checked["layers"], checked["of_layers"], checked["versions"]
    part = "" if layers == total else f"the first {layers} of {total} layers, "
    say(
        f"generates the same with a dynamic and a static cache as without ({part}transformers {versions['transformers']}, "
        f"torch {versions['torch']}, {checked['seconds']} s)"
    )
    if not checked["own_code"]:
        say("its Python files are not this version's and were not run: `mla-convert refresh` renews them")


def _self_check(folder: Path) -> dict[str, Any]:
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
