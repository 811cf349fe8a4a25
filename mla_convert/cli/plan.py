"""`mla-convert plan`: sizes and needs of a conversion, from the configuration alone."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from mla_convert.cli.options import Quiet, Verbose, from_settings
from mla_convert.cli.terminal import print_location, silence_libraries
from mla_convert.core.settings import ConvertConfig
from mla_convert.core.words import say

EXAMPLE = "mla-convert plan llama-8b --rank 512 --gpu h100"
SETTINGS = (
    "rank", "rope_dim", "nope_dim", "kv_ratio", "cache_dtype", "cache_group", "cache_rope", "uniform", "engine", "budget",
    "heal_tokens", "heal_length", "heal_train", "revision",
)  # fmt: skip


@from_settings(ConvertConfig, only=SETTINGS)
def plan(
    *,
    source: Annotated[str, typer.Argument(help="Folder, Hub id, .gguf file or recipe, as for a conversion.")],
    gpu: Annotated[str | None, typer.Option(help="Card to fit into: h100, a100-80, 4090, l4, mi300x, …")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory to fit into, instead of --gpu: 80GB, 24GiB, …")] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Also give time and memory on 1, 2, 4, … and N GPUs.", show_default=False
        ),
    ] = None,
    settings: dict[str, Any],
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Cache, parameters, disk and memory before and after a conversion of SOURCE. Reads its configuration, no weights."""
    from mla_convert.core.recipes import build_config
    from mla_convert.pipeline.estimate.memory import card_memory

    card = card_memory(gpu, memory)
    config = build_config({**settings, "source": source})
    silence_libraries(quiet)
    from mla_convert.core.console import Terminal
    from mla_convert.pipeline.dry_run import plan_conversion, print_plan

    result = plan_conversion(config, card, gpu, gpus)
    if json_:
        say(json.dumps(result.as_dict(), indent=2))
    else:
        console = Terminal()
        print_plan(result, console)
        print_location(config.source, result.source.name, console)
