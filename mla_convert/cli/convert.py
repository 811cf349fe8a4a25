"""`mla-convert convert`, the main job: options to settings, settings to a conversion, its report to the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mla_convert.cli.launch import check_count, follows, launch
from mla_convert.cli.options import HUB, Export, Private, Quiet, RecipeName, Source, Verbose, from_settings
from mla_convert.cli.terminal import is_verbose, run_guarded, silence_libraries
from mla_convert.core.errors import MlaConvertError, UsageError
from mla_convert.core.settings import RUN, ConvertConfig
from mla_convert.core.words import say

EXAMPLE = "mla-convert llama-8b --rank 512 --out llama-8b-mla"
OUT_OF_MEMORY = "out of memory: lower --calib-samples, --calib-length or --refine-batch"


Gpus = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Convert in N processes, one for each GPU of this host (with --device cpu: on its cores).",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="REPO",
        help="Then push to this repository (owner/name), as `push` does. The token is checked before the conversion.",
        rich_help_panel=HUB,
        show_default=False,
    ),
]


@from_settings(ConvertConfig, skip=("source",))
def convert(
    *,
    source: Source = None,
    recipe: RecipeName = None,
    settings: dict[str, Any],
    gpus: Gpus = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON on stdout.", rich_help_panel=RUN)
    ] = False,
    export: Export = None,
    push_to_hub: PushToHub = None,
    private: Private = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int | None:
    """Convert SOURCE to Multi-head Latent Attention and write it, with a report, to a folder."""
    if private and not push_to_hub:
        raise UsageError("--private is for --push-to-hub: give both, or neither")
    from mla_convert.core.recipes import build_config

    config = build_config({**settings, "source": source, "recipe": recipe})
    if check_count(gpus):
        return launch(gpus or 1)
    silence_libraries(quiet)
    # Imported here, not above: options are refused before seconds of importing torch, and libraries read at import what
    # `silence_libraries` set.
    from mla_convert.core.console import Terminal
    from mla_convert.core.processes import leave
    from mla_convert.core.progress import Progress
    from mla_convert.pipeline.convert import convert as convert_checkpoint
    from mla_convert.pipeline.resolve import check_export
    from mla_convert.publish import hub
    from mla_convert.report.tables import print_summary

    progress = Progress(quiet=quiet, verbose=is_verbose())
    if export:
        # What would fail after hours of converting is refused now; so is a push without access.
        check_export(config, export)
    if push_to_hub and not follows():
        hub.check_access(push_to_hub)
    report = run_guarded(lambda: convert_checkpoint(config, progress), OUT_OF_MEMORY)
    leave()
    if report is None:  # this is not the first of several processes
        return None
    assert report.out is not None
    if json_:
        say(json.dumps({**report.as_dict(), "out": str(report.out)}, indent=2))
    else:
        print_summary(report, Terminal())
        # Engines quantise the cache of an export themselves.
        if report.cache.latent_cache is None and report.cache.share_saved > 0 and not (config.engine or export):
            say(
                "at equal bytes, more rank in fewer bits keeps more on the models that were measured: --cache-dtype auto"
            )
    if export:
        _export(report.out, export, quiet or json_)
    if push_to_hub:
        try:
            pushed = hub.push(report.out, push_to_hub, private=private, progress=progress)
        except MlaConvertError as error:
            error.args = (f"{error}; the converted model is in {report.out}, to be pushed later",)
            raise
        say(f"{len(pushed.files)} files are at {pushed.url}", err=json_)
    return None


def _export(folder: Path, profile: str, quiet: bool) -> None:
    """Export a conversion beside it. Where that fails, the conversion stays, and the message says where it is."""
    from mla_convert.cli.export import run_export, summary

    try:
        # Overwritten, because the conversion itself replaces the folder of an earlier one.
        exported = run_export(folder, profile, overwrite=True, quiet=quiet)
    except MlaConvertError as error:
        error.args = (f"{error}; the converted model is in {folder}",)
        raise
    # On stderr, because stdout may be the report as JSON.
    say(summary(exported), err=True)
