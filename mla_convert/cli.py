"""The command line: options in, one call, an exit code out. Imports no torch, so that --help answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mla_convert.errors import Interrupted, MlaConvertError, ResourceError

EXIT_CODES = "Exit codes: 0 done, 1 a bug, 2 usage, 4 bad input, 5 resources (disk, device, network), 130 interrupted."
# The base of all errors of the parser: click's own, or the copy of click that newer typers carry.
ParserError = typer.BadParameter.__base__
SIZE, TEXT, REFINE, RUN = "Cache size", "Calibration and evaluation text", "Refinement", "Output and device"


class DefaultGroup(TyperGroup):
    """`mla-convert SOURCE …` is `mla-convert convert SOURCE …`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Put `convert` in front unless the first word is a command or an option of the whole."""
        own = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        """The main job's options are what a user looks for first: show them with the list of commands."""
        super().format_help(ctx, formatter)
        convert = self.commands["convert"]
        with typer.Context(convert, info_name=f"{ctx.info_name} [convert]") as inner:
            convert.format_help(inner, formatter)


app = typer.Typer(
    cls=DefaultGroup,
    help="Retrofit Multi-head Latent Attention onto Hugging Face checkpoints: a smaller KV cache, the same words.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _rank(value: str | None) -> int | str | None:
    if value is None or value == "full":
        return value
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a whole number nor 'full'") from None


def _version(show: bool) -> None:
    if show:
        from mla_convert.environment import versions

        typer.echo("  ".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def root(  # noqa: D103  (a docstring here would replace the application's help)
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions, and exit.")
    ] = False,
) -> None:
    return


@app.command(epilog=f"Example: mla-convert llama-8b --rank 512 --out llama-8b-mla    {EXIT_CODES}")
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder, Hub id (owner/name), .gguf file, or recipe (demo, llama-8b, …).")
    ],
    rank: Annotated[
        str | None,
        typer.Option(help="kv_lora_rank: numbers of latent per token and layer, or 'full'.", rich_help_panel=SIZE),
    ] = None,
    rope_dim: Annotated[
        str | None,
        typer.Option(
            help="qk_rope_head_dim: rotary dims kept in the cache (even), or 'full'. "
            "Default: a third of the rank, at most 64.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    kv_ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the original cache to keep; chooses rank and rope-dim. Default 0.5 if no rank is given.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    planes: Annotated[
        str | None,
        typer.Option(
            help="Which planes stay rotary: 'loss' (those that would lose most) or 'even' (evenly spaced).",
            rich_help_panel=SIZE,
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: .txt, .jsonl (either .gz), or a data set NAME:CONFIG@SPLIT. Default: WikiText-2 "
            "from the Hub, or the packaged text when that cannot be reached.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    calib_samples: Annotated[
        int | None, typer.Option(help="Calibration windows. Default 256 (CPU: 32).", rich_help_panel=TEXT)
    ] = None,
    calib_length: Annotated[
        int | None, typer.Option(help="Tokens in a calibration window. Default 1024 (CPU: 512).", rich_help_panel=TEXT)
    ] = None,
    eval_: Annotated[
        str | None, typer.Option("--eval", help="Evaluation text, named like --calib's.", rich_help_panel=TEXT)
    ] = None,
    eval_windows: Annotated[
        int | None, typer.Option(help="Evaluation windows at most. Default 40.", rich_help_panel=TEXT)
    ] = None,
    eval_length: Annotated[
        int | None,
        typer.Option(help="Tokens in an evaluation window. Default 2048, or the model's limit.", rich_help_panel=TEXT),
    ] = None,
    refine_steps: Annotated[
        int | None,
        typer.Option(
            help="Gradient steps a layer; 0 is closed form only. Default 300 (CPU: 30).", rich_help_panel=REFINE
        ),
    ] = None,
    refine_batch: Annotated[
        int | None,
        typer.Option(help="Windows in a step. Default: 8192 tokens' worth (CPU: 2048).", rich_help_panel=REFINE),
    ] = None,
    refine_lr: Annotated[
        float | None,
        typer.Option(help="Step size relative to each parameter's magnitude. Default 0.02.", rich_help_panel=REFINE),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write. Default: NAME-mla here.", rich_help_panel=RUN)
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an output folder that is not a converted model.", rich_help_panel=RUN
        ),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub source.", rich_help_panel=RUN)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto (the source's), float32, bfloat16 or float16.", rich_help_panel=RUN),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto (CUDA if there), cpu, cuda, cuda:N.", rich_help_panel=RUN)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Draws calibration windows and batches.", rich_help_panel=RUN)
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON on stdout.", rich_help_panel=RUN)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=RUN)] = False,
) -> None:
    """Convert SOURCE to Multi-head Latent Attention and write it, with a report, to a folder."""
    options = {key: value for key, value in locals().items() if key not in ("json_", "quiet", "eval_")}
    options |= {"rank": _rank(rank), "rope_dim": _rank(rope_dim), "eval": eval_}
    run_conversion(options, as_json=json_, quiet=quiet)


def run_conversion(options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Options to settings, settings to a conversion, its report to the terminal."""
    from mla_convert.config import build_config

    config = build_config(options)
    _silence_libraries()
    from rich.console import Console
    from torch import OutOfMemoryError

    from mla_convert.pipeline import convert as convert_checkpoint
    from mla_convert.progress import Progress
    from mla_convert.report import print_summary

    try:
        report = convert_checkpoint(config, Progress(quiet=quiet))
    except KeyboardInterrupt as stop:
        raise Interrupted(": ".join(["interrupted", *map(str, stop.args)])) from None
    except (MemoryError, OutOfMemoryError) as error:
        raise ResourceError("out of memory: lower --calib-samples, --calib-length or --refine-batch") from error
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "out": str(report.out)}, indent=2))
    else:
        print_summary(report, Console())


def _silence_libraries() -> None:
    """Only our own words on the terminal: libraries' advice is not for our users."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def main() -> None:
    """Entry point: every expected failure is one line on stderr and its exit code."""
    try:
        code = app(standalone_mode=False)
        if code == Interrupted.exit_code:  # what typer makes of Ctrl-C
            raise Interrupted("interrupted")
        sys.exit(code)
    except ParserError as error:
        if not sys.argv[1:]:  # typer has shown the help
            sys.exit(error.exit_code)
        _fail(f"{error.format_message()} (--help lists the options)", error.exit_code)
    except MlaConvertError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", Interrupted.exit_code)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 5)


def _fail(message: str, code: int) -> None:
    typer.echo(f"mla-convert: {' '.join(message.split())}", err=True)
    sys.exit(code)
