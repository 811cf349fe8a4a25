"""`mla-convert sweep`: conversions at several sizes, their frontier of cache and quality, and the smallest good enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mla_convert.cli.convert import OUT_OF_MEMORY
from mla_convert.cli.launch import launched
from mla_convert.cli.options import Export, Quiet, RecipeName, Source, Verbose, from_settings, rank_or_full
from mla_convert.cli.terminal import run_guarded, silence_libraries
from mla_convert.core.errors import GateFailed, UsageError
from mla_convert.core.settings import SIZE, ConvertConfig
from mla_convert.core.words import say

EXAMPLE = "mla-convert sweep llama-8b --kv-ratios 0.5,0.33,0.25 --max-ppl-ratio 1.05 --out llama-8b-mla"
CHOICE = "Sweep"
# Settings of a conversion that a sweep sets itself, or has options of its own for.
OWN = ("source", "rank", "rope_dim", "kv_ratio", "budget", "seed", "out", "held_out")

KvRatios = Annotated[
    str, typer.Option(help="Fractions of the original cache, separated by commas.", rich_help_panel=SIZE)
]
RopeDims = Annotated[
    str | None,
    typer.Option(
        help="Rotary dimensions to try at each of them, separated by commas. Default: a conversion's.",
        rich_help_panel=SIZE,
        show_default=False,
    ),
]
Seeds = Annotated[str, typer.Option(help="Seeds to try at each of them, separated by commas.", rich_help_panel=CHOICE)]
MaxRatio = Annotated[
    float | None,
    typer.Option(
        help="Choose the smallest cache whose perplexity on the held-out text is at most this ratio to the original's; exit "
        "code 3 if there is none.",
        rich_help_panel=CHOICE,
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Write the chosen conversion to this folder.", rich_help_panel=CHOICE, show_default=False),
]
HeldOut = Annotated[
    str | None,
    typer.Option(
        help="Text to choose by, named as for --calib. Default: the last tenth of the calibration text, which calibration "
        "then does not use.",
        rich_help_panel=CHOICE,
        show_default=False,
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        help="Folder of sweep.json and sweep.html; points that it holds are not converted again. Default: NAME-sweep in the "
        "working folder.",
        rich_help_panel=CHOICE,
        show_default=False,
    ),
]


@from_settings(ConvertConfig, skip=OWN)
def sweep(
    *,
    source: Source = None,
    recipe: RecipeName = None,
    kv_ratios: KvRatios = "0.67,0.5,0.33,0.25",
    rope_dims: RopeDims = None,
    seeds: Seeds = "0",
    max_ppl_ratio: MaxRatio = None,
    out: Out = None,
    held_out: HeldOut = None,
    folder: Folder = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep all conversions, in --folder.", rich_help_panel=CHOICE)
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print sweep.json on stdout.", rich_help_panel=CHOICE)] = False,
    settings: dict[str, Any],
    export: Export = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert SOURCE at several sizes and show what each costs: a table, sweep.json and sweep.html.

    With --export, every point is exported in --folder, or with --out the chosen conversion beside it. Sizes are then
    uniform, and the planes those that the profile needs, where no option and no --for says otherwise.
    """
    if out is not None and max_ppl_ratio is None:
        raise UsageError("--out writes the conversion that --max-ppl-ratio chooses: give both, or --keep")
    if max_ppl_ratio is not None and not max_ppl_ratio > 0:
        raise UsageError(f"--max-ppl-ratio {max_ppl_ratio} is no ratio: give a number above 0")
    # A list that cannot be read is refused before seconds of importing torch.
    ratios = _listed(kv_ratios, "--kv-ratios", float)
    rope = _listed(rope_dims, "--rope-dims", rank_or_full) if rope_dims is not None else (None,)
    draws = _listed(seeds, "--seeds", int)
    from mla_convert.core.recipes import build_config, default_name

    own = {"source": source, "recipe": recipe, "held_out": held_out, "out": out}
    # The first point stands for all of them, so that options that contradict each other are refused before any
    # conversion.
    config = build_config({**settings, **own, "kv_ratio": ratios[0], "seed": min(draws)})
    if out is None:
        config = config.model_copy(update={"out": None})  # a recipe names one
    if launched():
        raise UsageError("a sweep runs in one process: start it without accelerate or torchrun")
    silence_libraries(quiet)
    from mla_convert.core.progress import Progress
    from mla_convert.core.report_file import read_content
    from mla_convert.pipeline.sweep import Grid
    from mla_convert.pipeline.sweep import sweep as run
    from mla_convert.pipeline.sweep_file import SWEEP

    place = folder or Path(default_name(config.source).removesuffix("-mla") + "-sweep")
    grid, progress = Grid(ratios, rope, draws), Progress(quiet=quiet, verbose=verbose)
    try:
        content = run_guarded(
            lambda: run(config, grid, place, keep=keep, max_ppl_ratio=max_ppl_ratio, export=export, progress=progress),
            OUT_OF_MEMORY,
        )
    # No point is good enough, and all of them were measured: they are shown all the same.
    except GateFailed:
        _show(read_content(place / SWEEP), place, json_)
        raise
    _show(content, place, json_)
    if out is not None and not json_:
        say(f"the chosen conversion is in {out}")


def _show(content: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print sweep.json, or its table."""
    from mla_convert.core.console import Terminal
    from mla_convert.pipeline.sweep_file import SWEEP_PAGE, print_sweep

    if as_json:
        say(json.dumps(content, indent=2))
    else:
        print_sweep(content, Terminal())
        say(f"{folder / SWEEP_PAGE} shows it")


def _listed(text: str, option: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """`0.5,0.25` as numbers, each one once."""
    try:
        numbers = tuple(dict.fromkeys(kind(word.strip()) for word in text.split(",") if word.strip()))
    except (ValueError, typer.BadParameter):
        numbers = ()
    if not numbers:
        raise UsageError(f"{option} {text!r} is no list of numbers: give them with commas between")
    return numbers
