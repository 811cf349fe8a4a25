"""`mla-convert heal`: distil a converted model from its original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mla_convert.cli.options import Quiet, Verbose, from_settings
from mla_convert.cli.terminal import is_verbose, run_guarded, silence_libraries
from mla_convert.core.errors import UsageError
from mla_convert.core.settings import RUN
from mla_convert.core.words import say
from mla_convert.heal.settings import HealConfig

EXAMPLE = "mla-convert heal llama-8b-mla --teacher meta-llama/Llama-3.1-8B --data my-domain.txt --tokens 20M"
OUT_OF_MEMORY = "out of memory: lower --micro-tokens, give --gradient-checkpointing, or --train attention or lora"


@from_settings(HealConfig, skip=("folder", "teacher_revision"))
def heal(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder of a converted model.", show_default=False)],
    settings: dict[str, Any],
    json_: Annotated[
        bool, typer.Option("--json", help="Print the new report as JSON on stdout.", rich_help_panel=RUN)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Distil FOLDER, a converted model, from its original: brief training that recovers part of what it lost."""
    from pydantic import ValidationError

    from mla_convert.core.recipes import first_problem

    try:
        config = HealConfig.model_validate({"folder": folder, **settings})
    except ValidationError as error:
        raise UsageError(first_problem(error)) from error
    silence_libraries(quiet)
    from mla_convert.core.console import Terminal
    from mla_convert.core.progress import Progress
    from mla_convert.heal.run import heal as run
    from mla_convert.report.tables import print_healing

    report = run_guarded(lambda: run(config, Progress(quiet=quiet, verbose=is_verbose())), OUT_OF_MEMORY)
    if not report:  # this is not the first of several processes
        return
    if json_:
        say(json.dumps(report.as_dict(), indent=2))
    else:
        print_healing(report, config.out or config.folder, Terminal())
