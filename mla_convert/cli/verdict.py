"""A gate's limits, its verdict and how that is printed, for `gate` and `push`. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_convert.cli.terminal import run_guarded, silence_libraries
from mla_convert.core.words import say

if TYPE_CHECKING:
    from rich.console import Console

    from mla_convert.evaluate.gate import Limits, Verdict

OUT_OF_MEMORY = "out of memory: lower --eval-length, --eval-windows or --passkey-length, or give --dtype bfloat16"


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
    """Limits from options as typed; fractions may be percentages."""
    from mla_convert.evaluate.gate import Limits, percentage

    saving, regression, agreement = (
        None if text is None else percentage(text) for text in (min_kv_saving, max_regression, min_agreement)
    )
    return Limits(max_ppl_ratio, max_ppl, saving, regression, baseline, max_kl, agreement, max_worst_ratio)


def judge(
    model: str, limits: Limits, from_report: bool, against: str | None, quiet: bool, options: dict[str, Any]
) -> Verdict:
    """Measure the model, or read its report, and check it.

    Args:
        model: Name of the model, as `gate` takes it.
        limits: The limits to check.
        from_report: Read the results from the model's report.json instead of measuring.
        against: Name of the original, if one was given.
        quiet: Show no progress.
        options: Options of the measurement, as `evaluate_model` takes them.

    Raises:
        ResourceError: Memory did not suffice.
    """
    from mla_convert.evaluate.gate import run_gate

    silence_libraries(quiet)
    if from_report:
        # Without a measurement there is nothing that these could change; the commands refuse those that a user gave.
        options = {}
    else:
        from mla_convert.core.progress import Progress

        options = {**options, "progress": Progress(quiet=quiet)}
    return run_guarded(lambda: run_gate(model, limits, from_report, against, **options), OUT_OF_MEMORY)


def print_verdict(verdict: Verdict, to_stderr: bool = False, console: Console | None = None) -> None:
    """Print the table of checks, and the reasons of those that failed."""
    from mla_convert.core.console import Terminal
    from mla_convert.report.gate_formats import reasons, table
    from mla_convert.report.table import print_lines

    console = console or Terminal(stderr=to_stderr)
    console.print(table(verdict))
    print_lines(reasons(verdict), console)


def tell_github(verdict: Verdict, to_stderr: bool) -> None:
    """Write annotations and a job summary where the environment variables of GitHub's runner ask for them."""
    from mla_convert.report.gate_formats import error_lines, markdown

    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in error_lines(verdict):
            say(line, err=to_stderr)  # the runner reads both
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        # Appended, because other steps and commands write to the same summary.
        with open(summary, "a", encoding="utf-8") as file:
            file.write(markdown(verdict))
