"""`mla-convert gate`: check a model against limits, for a CI job."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from mla_convert.cli.options import (
    OUTPUT,
    Against,
    Baseline,
    Device,
    Dtype,
    FromReport,
    Length,
    MaxKl,
    MaxPerplexity,
    MaxRatio,
    MaxRegression,
    MaxWorst,
    MinAgreement,
    MinSaving,
    Model,
    Quiet,
    SuiteWindows,
    Text,
    Verbose,
    Windows,
)
from mla_convert.cli.verdict import judge, print_verdict, read_limits, tell_github
from mla_convert.core.errors import GateFailed, InputError, UsageError
from mla_convert.core.words import say

EXAMPLE = "mla-convert gate llama-8b-mla --max-ppl-ratio 1.05 --min-kv-saving 70%"


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
    # Before the measurement, whose result could then not be written.
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
    # All outputs come first, because a failed gate leaves as an exception.
    tell_github(verdict, to_stderr=json_)
    if not verdict.passed:
        raise GateFailed(verdict.summary)
