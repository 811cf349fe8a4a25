"""`mla-convert heal`: distil a converted model from its original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mla_convert.cli.options import Quiet, Verbose, is_verbose, silence_libraries
from mla_convert.core.errors import Interrupted, ResourceError, UsageError
from mla_convert.core.words import say

EXAMPLE = "mla-convert heal llama-8b-mla --teacher meta-llama/Llama-3.1-8B --data my-domain.txt --tokens 20M"
TEXT, TRAINING, LOSS, RUN = "Text", "Training", "Loss", "Output and device"
OUT_OF_MEMORY = "out of memory: lower --micro-tokens, give --gradient-checkpointing, or --train attention or lora"


def heal(
    folder: Annotated[Path, typer.Argument(help="Folder of a converted model.", show_default=False)],
    tokens: Annotated[
        str, typer.Option(help="Tokens to train on, all passes over the text together: 200k, 20M, 1B.")
    ] = "20M",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The original: folder, Hub id, .gguf file or recipe. Default: what the conversion's report names, "
            "if it can be found.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to train on: .txt, .jsonl, .csv, .parquet, or a data set NAME:CONFIG@SPLIT, which is streamed. Its end "
            "is held out. Default: WikiText-2 from the Hub, or the packaged text when that cannot be reached.",
            rich_help_panel=TEXT,
            show_default=False,
        ),
    ] = None,
    joined: Annotated[
        bool,
        typer.Option("--joined", help="Rows of the data are parts of one text, not documents.", rich_help_panel=TEXT),
    ] = False,
    length: Annotated[
        str | None,
        typer.Option(
            help="Tokens in a window, or a mix of lengths with shares of the tokens: 1024:0.75,8192:0.25. Default 2048, or "
            "the model's limit.",
            rich_help_panel=TEXT,
            show_default=False,
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Share of the tokens of every second window that are replaced by random ones. Default 0.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    self_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the text that the original writes itself, sampled from it beforehand. Default 0.5.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    eval_: Annotated[
        str | None, typer.Option("--eval", help="Evaluation text, as for eval.", rich_help_panel=TEXT)
    ] = None,
    eval_windows: Annotated[
        int | None, typer.Option(help="Evaluation windows at most.", rich_help_panel=TEXT, show_default=False)
    ] = None,
    eval_length: Annotated[
        int | None, typer.Option(help="Tokens in an evaluation window.", rich_help_panel=TEXT, show_default=False)
    ] = None,
    passkey: Annotated[
        bool, typer.Option("--passkey", help="The pass key test before and after.", rich_help_panel=TEXT)
    ] = False,
    passkey_length: Annotated[
        int | None,
        typer.Option(help="Tokens of its longest text; turns it on.", rich_help_panel=TEXT, show_default=False),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="all, attention, or lora (needs the extra heal).", rich_help_panel=TRAINING),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak step size, relative to each parameter's magnitude (lora: absolute).",
            rich_help_panel=TRAINING,
            show_default=False,
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Rank of adapters. Default 64.", rich_help_panel=TRAINING)
    ] = None,
    step_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a step, over all processes. Default: by --tokens, at most 32768 (CPU: 8192).",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    micro_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a forward pass. Default 16384 (CPU: 4096).", rich_help_panel=TRAINING),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, a third slower.", rich_help_panel=TRAINING),
    ] = False,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="torch.compile, and CUDA graphs on one GPU. Default from 4M tokens on a GPU.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Looks at the held-out text at most. Default 20.", rich_help_panel=TRAINING)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Looks without gain that end the run. Default 10.", rich_help_panel=TRAINING),
    ] = None,
    kl_weight: Annotated[
        float | None, typer.Option(help="Of KL(original ‖ model). Default 1.", rich_help_panel=LOSS)
    ] = None,
    ce_weight: Annotated[
        float | None,
        typer.Option(
            help="Of the given text's cross-entropy, which teaches that text and not the original. Default 0.",
            rich_help_panel=LOSS,
        ),
    ] = None,
    hidden_weight: Annotated[
        float | None,
        typer.Option(help="Of the relative error of every layer's hidden states. Default 0.", rich_help_panel=LOSS),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of both distributions in the KL. Default 1.", rich_help_panel=LOSS)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write. Default: FOLDER itself, replaced when all is done.", rich_help_panel=RUN),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an --out that is not a converted model.", rich_help_panel=RUN)
    ] = False,
    checkpoint_minutes: Annotated[
        float | None,
        typer.Option(help="Between checkpoints, from which the same command goes on. Default 10.", rich_help_panel=RUN),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (CUDA if there), cpu, cuda, cuda:N.", rich_help_panel=RUN)] = "auto",
    seed: Annotated[int | None, typer.Option(help="Draws windows and adapters.", rich_help_panel=RUN)] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the new report as JSON on stdout.", rich_help_panel=RUN)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Distil FOLDER, a converted model, from its original: brief training that gives back most of what it lost."""
    own = ("json_", "quiet", "verbose", "eval_", "compile_")
    options = {key: value for key, value in locals().items() if key not in (*own, "own") and value is not None}
    options |= {name: value for name, value in (("eval", eval_), ("compile", compile_)) if value is not None}
    from pydantic import ValidationError

    from mla_convert.core.settings import first_problem
    from mla_convert.heal.settings import HealConfig

    try:
        config = HealConfig.model_validate(options)
    except ValidationError as error:
        raise UsageError(first_problem(error)) from error
    silence_libraries(quiet)
    from torch import OutOfMemoryError

    from mla_convert.core.console import Terminal
    from mla_convert.core.progress import Progress
    from mla_convert.heal.run import heal as run
    from mla_convert.report.tables import print_healing

    try:
        report = run(config, Progress(quiet=quiet, verbose=is_verbose()))
    except KeyboardInterrupt as stop:
        raise Interrupted(": ".join(["interrupted", *map(str, stop.args)])) from None
    except (MemoryError, OutOfMemoryError) as error:
        raise ResourceError(OUT_OF_MEMORY) from error
    if not report:  # not the first of several processes
        return
    if json_:
        say(json.dumps(report.as_dict(), indent=2))
    else:
        print_healing(report, config.out or config.folder, Terminal())
