"""`mla-convert convert`, the main job: options to settings, settings to a conversion, its report to the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mla_convert.cli.options import Quiet, Verbose, is_verbose, rank_or_full, silence_libraries
from mla_convert.cli.push import HUB, Private
from mla_convert.core.errors import Interrupted, MlaConvertError, ResourceError, UsageError
from mla_convert.core.words import say

EXAMPLE = "mla-convert llama-8b --rank 512 --out llama-8b-mla"
SIZE, TEXT, REFINE, RUN = "Cache size", "Calibration and evaluation text", "Refinement", "Output and device"
HEAL = "Healing"


def convert(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Folder, Hub id (owner/name), .gguf file, or recipe (demo, llama-8b, …, or a .yaml file).",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Settings from a YAML file (recipe.yaml of an output repeats its run) or packaged recipe; "
            "SOURCE, if given, takes the place of its source.",
            rich_help_panel=RUN,
        ),
    ] = None,
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
    uniform: Annotated[
        bool | None,
        typer.Option(
            "--uniform",
            help="The same rank and rope-dim in every layer, as serving engines need them. Default: they are means, and "
            "layers that lose more get more.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    planes: Annotated[
        str | None,
        typer.Option(
            help="Which planes stay rotary: 'loss' (those that would lose most), 'table' (of those one for each frequency, as "
            "serving engines need them) or 'even' (evenly spaced).",
            rich_help_panel=SIZE,
        ),
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="ENGINE",
            help="Choose sizes and planes that vllm, sglang or llama.cpp can serve; then see `export`.",
            rich_help_panel=SIZE,
            show_default=False,
        ),
    ] = None,
    calib: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT[=WEIGHT]",
            help="Calibration text: .txt, .jsonl, .csv, .parquet, or a data set NAME:CONFIG@SPLIT. Give several, with weights, "
            "for all that the model is for. Default: packaged texts of several kinds.",
            show_default=False,
            rich_help_panel=TEXT,
        ),
    ] = None,
    calib_samples: Annotated[
        int | None,
        typer.Option(
            help="Calibration windows. Default 2048, of wide models fewer, but 256 (CPU: 32).", rich_help_panel=TEXT
        ),
    ] = None,
    calib_length: Annotated[
        int | None, typer.Option(help="Tokens in a calibration window. Default 1024 (CPU: 512).", rich_help_panel=TEXT)
    ] = None,
    calib_noise: Annotated[
        float | None,
        typer.Option(
            help="Share of tokens replaced by random ones in every second calibration window, so that the model stays good "
            "on other text than that. Default 0.3.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    calib_self: Annotated[
        float | None,
        typer.Option(
            help="Share of calibration windows that the original writes itself, for which all of it must fit on the device. "
            "Default 0.5 on a GPU with room for eight of it, else 0.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    eval_: Annotated[
        str | None,
        typer.Option(
            "--eval",
            help="Evaluation text, named like --calib's; 'none': no evaluation, which the report then says.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    eval_windows: Annotated[
        int | None, typer.Option(help="Evaluation windows at most. Default 40.", rich_help_panel=TEXT)
    ] = None,
    eval_length: Annotated[
        int | None,
        typer.Option(help="Tokens in an evaluation window. Default 2048, or the model's limit.", rich_help_panel=TEXT),
    ] = None,
    suite_windows: Annotated[
        int | None,
        typer.Option(
            help="Windows of each kind of the packaged suite of texts that the result is measured on; 0: none. Default 4 of "
            "1024 tokens (CPU: 2 of 512).",
            rich_help_panel=TEXT,
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Also report perplexity on this text, to choose settings by; 'calib': the last tenth of the calibration "
            "text, which is then left out of calibration.",
            rich_help_panel=TEXT,
            show_default=False,
        ),
    ] = None,
    refine_steps: Annotated[
        int | None,
        typer.Option(
            help="Gradient steps a layer; 0 is closed form only. Default 200 (CPU: 30).", rich_help_panel=REFINE
        ),
    ] = None,
    refine_batch: Annotated[
        int | None,
        typer.Option(help="Windows in a step. Default: 8192 tokens' worth (CPU: 2048).", rich_help_panel=REFINE),
    ] = None,
    refine_lr: Annotated[
        float | None,
        typer.Option(
            help="Step size relative to each parameter's magnitude, less where little is lost. Default 0.025.",
            rich_help_panel=REFINE,
        ),
    ] = None,
    refine_block: Annotated[
        int | None,
        typer.Option(
            help="Layers that are then refined together; 1: none are. Default up to 6, as memory allows (CPU: 1).",
            rich_help_panel=REFINE,
        ),
    ] = None,
    block_steps: Annotated[
        int | None,
        typer.Option(
            help="Gradient steps a block. Default: a layer's for every 125 calibration windows.", rich_help_panel=REFINE
        ),
    ] = None,
    block_lr: Annotated[
        float | None,
        typer.Option(help="Step size for blocks, as --refine-lr. Default 0.009.", rich_help_panel=REFINE),
    ] = None,
    output_steps: Annotated[
        int | None,
        typer.Option(
            help="Further steps of the last layers, towards the original's next-token distribution. Default: a "
            "quarter of a block's (CPU: 0).",
            rich_help_panel=REFINE,
        ),
    ] = None,
    output_layers: Annotated[
        int | None,
        typer.Option(
            help="Layers at the end, in whole blocks, that take those further steps together. Default: as many as fit in "
            "a quarter of a GPU (CPU: the last one's).",
            rich_help_panel=REFINE,
        ),
    ] = None,
    heal_tokens: Annotated[
        str | None,
        typer.Option(
            help="Then distil it from the original on so many tokens (200k, 20M), as `heal` does.", rich_help_panel=HEAL
        ),
    ] = None,
    heal_data: Annotated[
        str | None,
        typer.Option(
            help="Text for that, named like --calib's. Default: that text if there is one, else WikiText-2.",
            rich_help_panel=HEAL,
        ),
    ] = None,
    heal_length: Annotated[
        str | None, typer.Option(help="Tokens in its windows, or a mix: 1024:0.75,8192:0.25.", rich_help_panel=HEAL)
    ] = None,
    heal_train: Annotated[
        str | None, typer.Option(help="What is trained: all, attention or lora.", rich_help_panel=HEAL)
    ] = None,
    heal_lr: Annotated[
        float | None, typer.Option(help="Peak step size, relative to each parameter's magnitude.", rich_help_panel=HEAL)
    ] = None,
    heal_self_share: Annotated[
        float | None,
        typer.Option(help="Share of its text that the original writes itself. Default 0.5.", rich_help_panel=HEAL),
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
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Then push to this repository (owner/name), as `push` does. Asked for at once whether the token is good.",
            rich_help_panel=HUB,
            show_default=False,
        ),
    ] = None,
    private: Private = None,
    export: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Then also write what engines serve, as `export` does, beside the output: portable, engine or hf-code.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert SOURCE to Multi-head Latent Attention and write it, with a report, to a folder."""
    own = ("json_", "quiet", "verbose", "eval_", "push_to_hub", "private", "export", "for_")
    options = {key: value for key, value in locals().items() if key not in (*own, "own")}
    options["calib"] = calib[0] if calib and len(calib) == 1 else calib or None
    options |= {"rank": rank_or_full(rank), "rope_dim": rank_or_full(rope_dim), "eval": eval_, "engine": for_}
    if private and not push_to_hub:
        raise UsageError("--private is for --push-to-hub: give both, or neither")
    run_conversion(options, as_json=json_, quiet=quiet, push_to_hub=push_to_hub, private=private, export=export)


def run_conversion(
    options: dict[str, Any],
    as_json: bool,
    quiet: bool,
    push_to_hub: str | None = None,
    private: bool | None = None,
    export: str | None = None,
) -> None:
    """Options to settings, settings to a conversion, its report to the terminal."""
    from mla_convert.core.recipes import build_config

    config = build_config(options)
    silence_libraries(quiet)
    from mla_convert.core.console import Terminal
    from mla_convert.core.progress import Progress
    from mla_convert.pipeline.convert import convert as convert_checkpoint
    from mla_convert.report.tables import print_summary

    progress = Progress(quiet=quiet, verbose=is_verbose())
    if export:
        from mla_convert.publish.engines.profiles import check_profile
        from mla_convert.publish.engines.target_engine import check_export
        from mla_convert.source.source import open_source

        check_export(config, check_profile(export), open_source(config.source, config.revision, weights=False))
    if push_to_hub:
        from mla_convert.publish import hub

        hub.check_access(push_to_hub)
    report = run_guarded(lambda: convert_checkpoint(config, progress))
    if as_json:
        say(json.dumps({**report.as_dict(), "out": str(report.out)}, indent=2))
    else:
        print_summary(report, Terminal())
    if export:
        _export(report.out, export, quiet or as_json)
    if push_to_hub:
        try:
            done = hub.push(report.out, push_to_hub, private=private, progress=progress)
        except MlaConvertError as error:
            error.args = (f"{error}; the converted model is in {report.out}, to be pushed later",)
            raise
        say(f"{len(done.files)} files are at {done.url}", err=as_json)


def _export(folder: Path, profile: str, quiet: bool) -> None:
    """What `--export` writes beside a conversion; where it cannot, the conversion stays and the message says so."""
    from mla_convert.cli.export import run_export, summary

    try:
        found = run_export(folder, profile, None, "auto", "auto", False, True, quiet)
    except MlaConvertError as error:
        error.args = (f"{error}; the converted model is in {folder}",)
        raise
    say(summary(found), err=True)


def run_guarded(work: Callable[[], Any]) -> Any:
    """What `work` returns; an interruption, and memory that does not suffice, become errors with their exit codes."""
    from torch import OutOfMemoryError

    try:
        return work()
    except KeyboardInterrupt as stop:
        raise Interrupted(": ".join(["interrupted", *map(str, stop.args)])) from None
    except (MemoryError, OutOfMemoryError) as error:
        raise ResourceError("out of memory: lower --calib-samples, --calib-length or --refine-batch") from error
