"""`mla-convert gate`: pass or fail, for a CI job."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mla_convert.cli.evaluate import (
    MEASURE,
    OUT_OF_MEMORY,
    Against,
    Device,
    Dtype,
    Length,
    Model,
    SuiteWindows,
    Text,
    Windows,
)
from mla_convert.cli.options import Quiet, Verbose, silence_libraries
from mla_convert.core.errors import GateFailed, InputError, ResourceError, UsageError
from mla_convert.core.words import say

if TYPE_CHECKING:
    from rich.console import Console

    from mla_convert.evaluate.gate import Limits, Verdict

EXAMPLE = "mla-convert gate llama-8b-mla --max-ppl-ratio 1.05 --min-kv-saving 70%"
LIMITS, OUTPUT = "Limits", "Output"


MaxRatio = Annotated[
    float | None,
    typer.Option(help="Most that perplexity may be over the original's.", rich_help_panel=LIMITS, show_default=False),
]
MaxPerplexity = Annotated[
    float | None, typer.Option(help="Most that perplexity may be.", rich_help_panel=LIMITS, show_default=False)
]
MinSaving = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Least share of the KV cache to be saved: 70% or 0.7.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
MaxWorst = Annotated[
    float | None,
    typer.Option(
        "--max-worst-ratio",
        help="The same of the packaged suite's worst kind of text.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Most that KL(original ‖ model) of the next token may be, mean over the suite's kinds of text.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
MinAgreement = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Least share of tokens at which both find the same next token likeliest: 90% or 0.9.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        help="report.json (or eval --json) of an earlier conversion to compare perplexity with.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
MaxRegression = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Most that perplexity may be above the baseline's: 1% or 0.01. Default 1%.",
        rich_help_panel=LIMITS,
        show_default=False,
    ),
]
FromReport = Annotated[
    bool,
    typer.Option("--from-report", help="Trust the model's report.json instead of measuring.", rich_help_panel=MEASURE),
]


def gate(
    model: Model,
    max_ppl_ratio: MaxRatio = None,
    max_ppl: MaxPerplexity = None,
    min_kv_saving: MinSaving = None,
    baseline: Baseline = None,
    max_regression: MaxRegression = None,
    max_worst_ratio: MaxWorst = None,
    max_kl: MaxKl = None,
    min_agreement: MinAgreement = None,
    from_report: FromReport = False,
    against: Against = None,
    text: Text = None,
    eval_windows: Windows = None,
    eval_length: Length = None,
    suite_windows: SuiteWindows = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    junit: Annotated[
        Path | None,
        typer.Option(help="Write the outcome as JUnit XML.", rich_help_panel=OUTPUT, show_default=False),
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the outcome as JSON on stdout.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check MODEL against limits: exit code 0 if all hold, 3 if one does not.

    In GitHub Actions, failed gates become annotations and a table in the job's summary.
    """
    from mla_convert.report.gate_formats import junit_xml

    began = time.perf_counter()
    limits = read_limits(
        max_ppl_ratio, max_ppl, min_kv_saving, baseline, max_regression, max_worst_ratio, max_kl, min_agreement
    )
    if junit and junit.is_dir():
        raise InputError(f"--junit {junit} is a folder: give a file")
    if from_report and not (against is text is eval_windows is eval_length is suite_windows is None):
        raise UsageError("--from-report measures nothing: leave out --against and the --eval options, or --from-report")
    options = {"text": text, "windows": eval_windows, "length": eval_length, "suite_windows": suite_windows,
               "dtype": dtype, "device": device}  # fmt: skip
    verdict = judge(model, limits, from_report, against, quiet, options)
    if junit:
        junit.parent.mkdir(parents=True, exist_ok=True)
        junit.write_text(junit_xml(verdict, time.perf_counter() - began), encoding="utf-8")
    if json_:
        say(json.dumps(verdict.as_dict(), indent=2))
    else:
        print_verdict(verdict)
    tell_github(verdict, to_stderr=json_)
    if not verdict.passed:
        raise GateFailed(verdict.summary)


def read_limits(
    max_ppl_ratio: float | None,
    max_ppl: float | None,
    min_kv_saving: str | None,
    baseline: Path | None,
    max_regression: str | None,
    max_worst_ratio: float | None = None,
    max_kl: float | None = None,
    min_agreement: str | None = None,
) -> Limits:
    """Limits as typed."""
    from mla_convert.evaluate.gate import Limits, percentage

    return Limits(max_ppl_ratio, max_ppl, min_kv_saving and percentage(min_kv_saving),
                  max_regression and percentage(max_regression), baseline,
                  max_kl, min_agreement and percentage(min_agreement), max_worst_ratio)  # fmt: skip


def judge(
    model: str, limits: Limits, from_report: bool, against: str | None, quiet: bool, options: dict[str, Any]
) -> Verdict:
    """Measure the model, or read its report, and check it; `options` are those of `evaluate_model`."""
    from mla_convert.evaluate.gate import run_gate

    silence_libraries(quiet)
    if from_report:
        options = {}
    else:
        from mla_convert.core.progress import Progress

        options = {**options, "progress": Progress(quiet=quiet)}
    try:
        return run_gate(model, limits, from_report, against, **options)
    except Exception as error:
        # named so and not imported: with --from-report there is no torch
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise ResourceError(OUT_OF_MEMORY) from error
        raise


def print_verdict(verdict: Verdict, to_stderr: bool = False, console: Console | None = None) -> None:
    """The table of checks, and why those that failed did."""
    from mla_convert.core.console import Terminal
    from mla_convert.report.gate_formats import reasons, table
    from mla_convert.report.table import print_lines

    console = console or Terminal(stderr=to_stderr)
    console.print(table(verdict))
    print_lines(reasons(verdict), console)


def tell_github(verdict: Verdict, to_stderr: bool) -> None:
    """Annotations and a summary, where GitHub's runner asks for them by its environment variables."""
    from mla_convert.report.gate_formats import error_lines, markdown

    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in error_lines(verdict):
            say(line, err=to_stderr)  # the runner reads both
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(markdown(verdict))
