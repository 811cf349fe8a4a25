"""`mla-convert plan`: sizes and needs of a conversion, from the configuration alone."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mla_convert.cli.options import Quiet, Verbose, rank_or_full, silence_libraries, tell_place
from mla_convert.core.words import say

EXAMPLE = "mla-convert plan llama-8b --rank 512 --gpu h100"


def plan(
    source: Annotated[str, typer.Argument(help="Folder, Hub id, .gguf file or recipe, as for a conversion.")],
    rank: Annotated[str | None, typer.Option(help="kv_lora_rank, or 'full'.")] = None,
    rope_dim: Annotated[str | None, typer.Option(help="qk_rope_head_dim (even), or 'full'.")] = None,
    kv_ratio: Annotated[
        float | None, typer.Option(help="Share of the original cache to keep. Default 0.5 if no rank is given.")
    ] = None,
    uniform: Annotated[
        bool | None, typer.Option("--uniform", help="The same sizes in every layer, as for a conversion.")
    ] = None,
    for_: Annotated[
        str | None, typer.Option("--for", metavar="ENGINE", help="Sizes for an engine, as for a conversion.")
    ] = None,
    heal_tokens: Annotated[
        str | None, typer.Option(help="Also what healing takes, on so many tokens: 20M.", show_default=False)
    ] = None,
    heal_train: Annotated[str | None, typer.Option(help="What healing trains: all, attention or lora.")] = None,
    heal_length: Annotated[str | None, typer.Option(help="Tokens in its windows, or a mix.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Card to fit into: h100, a100-80, 4090, l4, mi300x, …")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory to fit into, instead of --gpu: 80GB, 24GiB, …")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub source.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Cache, parameters, disk and memory before and after a conversion of SOURCE. Reads its configuration, no weights."""
    from mla_convert.core.recipes import build_config
    from mla_convert.pipeline.estimate.memory import card_memory

    card = card_memory(gpu, memory)
    sizes = {"rank": rank_or_full(rank), "rope_dim": rank_or_full(rope_dim), "kv_ratio": kv_ratio, "uniform": uniform,
             "heal_tokens": heal_tokens, "heal_train": heal_train, "heal_length": heal_length}  # fmt: skip
    sizes["engine"] = for_
    config = build_config({"source": source, "revision": revision, **sizes})
    silence_libraries(quiet)
    from mla_convert.core.console import Terminal
    from mla_convert.pipeline.dry_run import plan_conversion, print_plan

    result = plan_conversion(config, card, gpu)
    if json_:
        say(json.dumps(result, indent=2))
    else:
        console = Terminal()
        print_plan(result, console)
        tell_place(config.source, result["source"]["name"], console)
