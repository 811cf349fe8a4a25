"""`mla-convert sweep`: conversions at several sizes, the frontier that they draw, and the smallest that is good enough."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mla_convert.cli.convert import SIZE, run_guarded
from mla_convert.cli.convert import convert as convert_command
from mla_convert.cli.options import rank_or_full, silence_libraries
from mla_convert.core.errors import GateFailed, UsageError
from mla_convert.core.words import say

EXAMPLE = "mla-convert sweep llama-8b --kv-ratios 0.5,0.33,0.25 --max-ppl-ratio 1.05 --out llama-8b-mla"
CHOICE = "Sweep"
# What a sweep does not share with a conversion, or has its own words for.
OWN = ("rank", "rope_dim", "kv_ratio", "seed", "out", "held_out", "json_", "push_to_hub", "private")


def _with_conversion_options(own: Callable[..., None]) -> Callable[..., None]:
    """The options of `own`, and those of a conversion that it leaves to be: what convert learns, sweep knows."""
    theirs = inspect.signature(convert_command, eval_str=True).parameters
    ours = inspect.signature(own, eval_str=True).parameters
    shared = [parameter for name, parameter in theirs.items() if name not in OWN]
    listed = [parameter for parameter in ours.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    everything = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*shared[:2], *listed, *shared[2:])
    ]

    def command(**options: Any) -> None:
        own(**options)

    command.__signature__ = inspect.Signature(everything)
    command.__doc__ = own.__doc__
    return command


@_with_conversion_options
def sweep(
    kv_ratios: Annotated[
        str, typer.Option(help="Shares of the original cache, with commas.", rich_help_panel=SIZE)
    ] = "0.67,0.5,0.33,0.25",
    rope_dims: Annotated[
        str | None,
        typer.Option(
            help="Rotary dims to try at each of them, with commas. Default: a conversion's.",
            rich_help_panel=SIZE,
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds to try at each of them, with commas.", rich_help_panel=CHOICE)
    ] = "0",
    max_ppl_ratio: Annotated[
        float | None,
        typer.Option(
            help="Choose the smallest cache whose perplexity on the held-out text is at most this over the original's; "
            "exit code 3 if there is none.",
            rich_help_panel=CHOICE,
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the chosen conversion to this folder.", rich_help_panel=CHOICE, show_default=False),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Text to choose by, named like --calib's. Default: the last tenth of the calibration text, which is then "
            "left out of calibration.",
            rich_help_panel=CHOICE,
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of sweep.json and sweep.html; points that are in there already are not converted again. "
            "Default: NAME-sweep here.",
            rich_help_panel=CHOICE,
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep all conversions, in --folder.", rich_help_panel=CHOICE)
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print sweep.json on stdout.", rich_help_panel=CHOICE)] = False,
    **options: Any,
) -> None:
    """Convert SOURCE at several sizes, and draw what each costs: a table, sweep.json and sweep.html."""
    if out is not None and max_ppl_ratio is None:
        raise UsageError("--out writes the conversion that --max-ppl-ratio chooses: give both, or --keep")
    if max_ppl_ratio is not None and not max_ppl_ratio > 0:
        raise UsageError(f"--max-ppl-ratio {max_ppl_ratio} is no ratio: give a number above 0")
    shares = _listed(kv_ratios, "--kv-ratios", float)
    rope = _listed(rope_dims, "--rope-dims", rank_or_full) if rope_dims is not None else (None,)
    drawn = _listed(seeds, "--seeds", int)
    quiet, verbose = options.pop("quiet"), options.pop("verbose")
    from mla_convert.core.settings import build_config, default_name

    settings = {**options, "eval": options["eval_"], "held_out": held_out, "out": out, "kv_ratio": shares[0]}
    del settings["eval_"]
    config = build_config({**settings, "seed": min(drawn)})
    if out is None:
        config = config.model_copy(update={"out": None})  # a recipe names one
    silence_libraries(quiet)
    from mla_convert.core.console import Terminal
    from mla_convert.core.progress import Progress
    from mla_convert.core.report_file import read_content
    from mla_convert.pipeline.sweep import SWEEP, SWEEP_PAGE, Grid, print_sweep
    from mla_convert.pipeline.sweep import sweep as run

    place = folder or Path(default_name(config.source).removesuffix("-mla") + "-sweep")
    grid, progress = Grid(shares, rope, drawn), Progress(quiet=quiet, verbose=verbose)

    def show(found: dict[str, Any]) -> None:
        if json_:
            say(json.dumps(found, indent=2))
        else:
            print_sweep(found, Terminal())
            say(f"{place / SWEEP_PAGE} shows it")

    try:
        show(run_guarded(lambda: run(config, grid, place, keep=keep, max_ppl_ratio=max_ppl_ratio, progress=progress)))
    except GateFailed:
        show(read_content(place / SWEEP))
        raise
    if out is not None and not json_:
        say(f"the chosen conversion is in {out}")


def _listed(text: str, option: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """`0.5,0.25` as numbers, each one once."""
    try:
        found = tuple(dict.fromkeys(kind(word.strip()) for word in text.split(",") if word.strip()))
    except (ValueError, typer.BadParameter):
        found = ()
    if not found:
        raise UsageError(f"{option} {text!r} is no list of numbers: give them with commas between")
    return found
