"""`mla-convert quantize`: another format of a converted model's cache, without converting again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mla_convert.cli.options import Against, Device, Quiet, Verbose, from_settings
from mla_convert.cli.terminal import is_verbose, run_guarded, silence_libraries
from mla_convert.core.errors import UsageError
from mla_convert.core.settings import RUN, Settings
from mla_convert.core.words import say

EXAMPLE = "mla-convert quantize llama-8b-mla --cache-dtype int4 --out llama-8b-mla-int4"
# Ranks are those of the conversion: there is nothing for `auto` to choose.
WORDS = {
    "cache_dtype": "Numbers of the cached latent: fp8 (e4m3), int8, int4, or bf16, the model's own dtype.",
    "cache_rope": "Numbers of the rotary key: bf16, fp8 (e4m3), int8, which rounds less in as many bytes and decodes without "
    "the kernels, or int4, for --cache-dtype int4. Default: fp8.",
}
OUT_OF_MEMORY = "out of memory: run it with --device cpu"


@from_settings(Settings, only=("cache_dtype", "cache_group", "cache_rope"), words=WORDS)
def quantize(
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a converted model.", show_default=False)],
    settings: dict[str, Any],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder to write. Default: DIR itself.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    against: Against = None,
    device: Device = "auto",
    json_: Annotated[
        bool, typer.Option("--json", help="Print the new report as JSON on stdout.", rich_help_panel=RUN)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Give the converted model in DIR another format of its cache, fold the best basis for it into the weights, and measure it."""
    if "cache_dtype" not in settings:
        raise UsageError("no format is given: give --cache-dtype fp8, int8, int4 or bf16")
    silence_libraries(quiet)
    from mla_convert.core.console import Terminal
    from mla_convert.core.progress import Progress
    from mla_convert.pipeline.quantise import quantise
    from mla_convert.report.tables import print_summary

    progress = Progress(quiet=quiet, verbose=is_verbose())
    report = run_guarded(
        lambda: quantise(folder, **settings, out=out, against=against, device=device, progress=progress), OUT_OF_MEMORY
    )
    if json_:
        say(json.dumps({**report.as_dict(), "out": str(report.out)}, indent=2))
    else:
        print_summary(report, Terminal())
