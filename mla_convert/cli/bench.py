"""`mla-convert bench`: decoding speed of a model, and the largest batch that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mla_convert.cli.options import Quiet, Verbose
from mla_convert.cli.terminal import silence_libraries
from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.words import say
from mla_convert.evaluate.speed.shapes import SHAPES

EXAMPLE = "mla-convert bench llama-8b-mla --against meta-llama/Llama-3.1-8B --context 8192,32768 --batch 1,max"

SHAPE, WORK = "Random weights", "Work"

Model = Annotated[str | None, typer.Argument(help="Folder, Hub id or recipe; converted or not.", show_default=False)]
Against = Annotated[str | None, typer.Option(help="The original, named like MODEL.", show_default=False)]
Shape = Annotated[
    str | None,
    typer.Option(
        "--config",
        help=f"Instead of MODEL: random weights with the sizes of {', '.join(SHAPES)}, or of a config.json. With --rank, its "
        "conversion against it.",
        show_default=False,
        rich_help_panel=SHAPE,
    ),
]
Rank = Annotated[int | None, typer.Option(help="Rank of the conversion.", show_default=False, rich_help_panel=SHAPE)]
RopeDim = Annotated[int, typer.Option(help="Rotary dimensions of the conversion.", rich_help_panel=SHAPE)]
NopeDim = Annotated[
    int | None,
    typer.Option(min=1, help="Content dimensions of a head of the conversion, all if not given.", show_default=False,
                 rich_help_panel=SHAPE),
]  # fmt: skip
CacheDtype = Annotated[
    str,
    typer.Option(help="Cached latent of the conversion: bf16, fp8, int8 or int4, packed as by convert.", metavar="DTYPE",
                 rich_help_panel=SHAPE),
]  # fmt: skip
Context = Annotated[str, typer.Option(help="Tokens in the cache, separated by commas.", rich_help_panel=WORK)]
Batch = Annotated[
    str,
    typer.Option(
        help="Sequences, separated by commas; max is the largest batch that fits (CUDA).", rich_help_panel=WORK
    ),
]
PromptTokens = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        help="Also measure prefill of prompts of this many tokens, separated by commas.",
        show_default=False,
        rich_help_panel=WORK,
    ),
]
Steps = Annotated[int, typer.Option(min=2, help="Decode steps that are timed at every point.", rich_help_panel=WORK)]
Memory = Annotated[
    str | None,
    typer.Option(help="Use at most this much of the card's memory: 70GB.", show_default=False, rich_help_panel=WORK),
]
Price = Annotated[
    float | None,
    typer.Option(help="Price of the device per hour, for the cost of a million tokens.", show_default=False,
                 rich_help_panel=WORK),
]  # fmt: skip
Device = Annotated[str, typer.Option(help="auto (CUDA if there), cpu, cuda, cuda:N.", rich_help_panel=WORK)]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.", rich_help_panel=WORK)]
Plot = Annotated[
    Path | None, typer.Option(help="Write tokens/s against context as SVG.", show_default=False, rich_help_panel=WORK)
]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r}: give whole numbers with commas between") from None
    if min(numbers) < 1:
        raise UsageError(f"{option} {text!r}: every number must be at least 1")
    return numbers


def _sides(model: str | None, against: str | None, shape: str | None, rank: int | None, rope_dim: int, dtype: Any,
           device: Any, cache_dtype: str = "bf16", nope_dim: int | None = None) -> list[tuple[str, Any]]:  # fmt: skip
    """Names of the models, and a function that builds each."""
    from mla_convert.evaluate.speed.models import CACHE_DTYPES, converted_config, random_model, shape_config
    from mla_convert.source.load_model import find_model, load_model
    from mla_convert.source.shape import head_width
    from mla_convert.source.source import load_config

    if (model is None) == (shape is None):
        raise UsageError("give MODEL or --config, and not both")
    if cache_dtype not in CACHE_DTYPES:
        raise UsageError(f"--cache-dtype {cache_dtype!r}: give one of {', '.join(CACHE_DTYPES)}")
    if cache_dtype != "bf16" and rank is None:
        raise UsageError("--cache-dtype goes with --config and --rank: a MODEL has its own")
    if nope_dim is not None and rank is None:
        raise UsageError("--nope-dim goes with --config and --rank: a MODEL has its own")
    if shape is None:
        if rank is not None:
            raise UsageError("--rank goes with --config: a MODEL has its own")
        places = [(name, find_model(name)) for name in (model, against) if name]
        # A default, because the loop variable would be the last place in every function.
        return [(name, lambda place=place: load_model(place, dtype, device)) for name, place in places]
    if against:
        raise UsageError("--against goes with MODEL; --config with --rank measures both by itself")
    if shape in SHAPES:
        config = shape_config(SHAPES[shape])
    elif Path(shape).exists():
        path = Path(shape)
        config = load_config(path if path.is_dir() else path.parent, shape)
    else:
        raise InputError(f"--config {shape!r} is neither a file nor one of {', '.join(SHAPES)}")
    original = (shape, lambda: random_model(config, dtype, device))
    if rank is None:
        return [original]
    if nope_dim is not None and nope_dim > head_width(config):
        raise UsageError(f"--nope-dim {nope_dim} is above {head_width(config)}, the width of a head of {shape}")
    converted = converted_config(config, rank, rope_dim, cache_dtype, nope_dim)
    kind = "" if cache_dtype == "bf16" else f" {cache_dtype}"
    kind += "" if nope_dim is None else f", heads {nope_dim}+{rope_dim}"
    return [(f"{shape} {rank}+{rope_dim}{kind}", lambda: random_model(converted, dtype, device, config)), original]


def bench(
    model: Model = None,
    against: Against = None,
    config: Shape = None,
    rank: Rank = None,
    rope_dim: RopeDim = 64,
    nope_dim: NopeDim = None,
    cache_dtype: CacheDtype = "bf16",
    context: Context = "8192",
    batch: Batch = "1",
    prompt: PromptTokens = None,
    steps: Steps = 64,
    memory: Memory = None,
    price: Price = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    plot: Plot = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure decoding of any model or shape: tokens/s, latency, cache, largest batch, use of memory bandwidth, cost."""
    silence_libraries(quiet)
    contexts = _numbers(context, "--context")
    batches = tuple(None if part == "max" else _numbers(part, "--batch")[0] for part in batch.split(","))
    prompts = _numbers(prompt, "--prompt") if prompt else ()
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UsageError(f"--dtype {dtype!r}: give bfloat16, float16 or float32")
    if price is not None and not price > 0:
        raise UsageError(f"--price {price}: give a positive price")
    from mla_convert.core.console import Terminal
    from mla_convert.pipeline.estimate.memory import card_memory

    # Before torch is imported, so that a wrong --memory is refused at once.
    limit = card_memory(None, memory)
    import torch

    from mla_convert.core.runtime import pick_device
    from mla_convert.evaluate.speed import decode as measuring
    from mla_convert.report.speed import print_table, write_plot

    target = pick_device(device)
    sides = _sides(model, against, config, rank, rope_dim, getattr(torch, dtype), target, cache_dtype, nope_dim)
    request = measuring.BenchRequest(contexts, batches, prompts, limit, price, steps)
    console = Terminal(stderr=True)
    note = (lambda _: None) if quiet else (lambda words: console.print(words, style="dim", highlight=False))
    results = measuring.bench(sides, request, target, note)
    if plot:
        write_plot(results, plot)
    if json_:
        say(json.dumps(results.as_dict(), indent=2))
    else:
        # Where there is no terminal, rich would break the table at 80 columns.
        print_table(results, Terminal(width=None if Terminal().is_terminal else 140))
