"""`mla-convert eval`: measure a model, alone or against its original."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mla_convert.commands.shared import Quiet, Verbose, silence_libraries
from mla_convert.errors import ResourceError

EXAMPLE = "mla-convert eval llama-8b-mla --against meta-llama/Llama-3.1-8B"

MEASURE = "Measurement"
OUT_OF_MEMORY = "out of memory: lower --eval-length or --eval-windows, or give --dtype bfloat16"

Model = Annotated[
    str, typer.Argument(help="Folder, Hub id (owner/name), .gguf file or recipe; converted or not.", show_default=False)
]
Against = Annotated[
    str | None, typer.Option(help="The original, named like MODEL.", show_default=False, rich_help_panel=MEASURE)
]
Text = Annotated[
    str | None,
    typer.Option(
        "--eval",
        help="Text: .txt, .jsonl (either .gz), or a data set NAME:CONFIG@SPLIT. Default: the conversion's if it can be "
        "found, else WikiText-2 from the Hub, or the packaged text when that cannot be reached.",
        show_default=False,
        rich_help_panel=MEASURE,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        help="Windows at most. Default: the conversion's, else 40.", show_default=False, rich_help_panel=MEASURE
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        help="Tokens in a window. Default: the conversion's, else 2048 or the model's limit.",
        show_default=False,
        rich_help_panel=MEASURE,
    ),
]
Dtype = Annotated[
    str, typer.Option(help="auto (as MODEL is stored), float32, bfloat16 or float16.", rich_help_panel=MEASURE)
]
Device = Annotated[str, typer.Option(help="auto (CUDA if there), cpu, cuda, cuda:N.", rich_help_panel=MEASURE)]


def evaluate(
    model: Model,
    against: Against = None,
    text: Text = None,
    eval_windows: Windows = None,
    eval_length: Length = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure MODEL: perplexity, KV cache bytes, and how far it is from its original."""
    silence_libraries(quiet)
    from rich.console import Console
    from torch import OutOfMemoryError

    from mla_convert.evaluate import evaluate_model, print_evaluation
    from mla_convert.progress import Progress

    try:
        found = evaluate_model(model, against, text=text, windows=eval_windows, length=eval_length, dtype=dtype,
                               device=device, progress=Progress(quiet=quiet))  # fmt: skip
    except (MemoryError, OutOfMemoryError) as error:
        raise ResourceError(OUT_OF_MEMORY) from error
    if json_:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_evaluation(found, Console())
