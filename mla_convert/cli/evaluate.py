"""`mla-convert eval`: measure a model, alone or against its original."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from mla_convert.cli.options import (
    MEASURE,
    PROBES,
    Against,
    Device,
    Dtype,
    Length,
    Model,
    OriginalCache,
    Quiet,
    SuiteWindows,
    Text,
    Verbose,
    Windows,
)
from mla_convert.cli.terminal import is_verbose, print_location, run_guarded, silence_libraries
from mla_convert.cli.verdict import OUT_OF_MEMORY
from mla_convert.core.errors import UsageError
from mla_convert.core.original_cache import format_names
from mla_convert.core.words import say

EXAMPLE = "mla-convert eval llama-8b-mla --against meta-llama/Llama-3.1-8B"

Passkey = Annotated[
    bool,
    typer.Option(
        "--passkey",
        help="Passkey test: retrieve a five-digit key from long text, alone and among five, at five depths and at lengths up to "
        "the model's context.",
        rich_help_panel=PROBES,
    ),
]
PasskeyLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the longest passkey text; turns --passkey on. Default: the model's context.",
        show_default=False,
        rich_help_panel=PROBES,
    ),
]
Greedy = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Continue N prompts greedily, and compare with the original's continuations.",
        show_default=False,
        rich_help_panel=PROBES,
    ),
]
GreedyTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of a continuation at most. Default: 64.", show_default=False, rich_help_panel=PROBES),
]
HumanEval = Annotated[
    bool,
    typer.Option(
        "--humaneval",
        help="Have the model complete the 164 functions of HumanEval, and run their tests. This runs code that the model "
        "wrote, in a process with limits that stop accidents, not attacks (Linux). Needs the extra humaneval.",
        rich_help_panel=PROBES,
    ),
]
TaskNames = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        help="Tasks of lm-evaluation-harness, by name or as .yaml files, separated by commas. Needs the extra eval.",
        show_default=False,
        rich_help_panel=PROBES,
    ),
]
TaskLimit = Annotated[
    int | None,
    typer.Option(help="Examples of a task at most. Default: all.", show_default=False, rich_help_panel=PROBES),
]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="Measure a converted MODEL with another format of its cache, as `quantize` would write it: fp8, int8, int4 or "
        "bf16. A copy lies beside MODEL until the end.",
        show_default=False,
        rich_help_panel=MEASURE,
    ),
]
IntoReport = Annotated[
    bool,
    typer.Option(
        "--into-report",
        help="Add the quality probes, and the original's quantised caches, to MODEL's report.json, and make report.html and "
        "README.md again.",
        rich_help_panel=PROBES,
    ),
]


def evaluate(
    model: Model,
    against: Against = None,
    text: Text = None,
    eval_windows: Windows = None,
    eval_length: Length = None,
    suite_windows: SuiteWindows = None,
    original_cache: OriginalCache = None,
    cache_dtype: CacheDtype = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    passkey: Passkey = False,
    passkey_length: PasskeyLength = None,
    greedy: Greedy = 0,
    greedy_tokens: GreedyTokens = None,
    humaneval: HumanEval = False,
    tasks: TaskNames = None,
    task_limit: TaskLimit = None,
    into_report: IntoReport = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure MODEL: perplexity, KV cache bytes, and its distance from the original."""
    silence_libraries(quiet)
    from mla_convert.report.update import check_target, write_into_report

    names = tuple(name for name in (part.strip() for part in (tasks or "").split(",")) if name)
    if (tasks is not None or task_limit is not None) and not names:
        raise UsageError("--tasks names no task: give names or .yaml files, with commas between")
    formats = _formats(original_cache, against)
    # The default is set below, so that None still tells that the option was not given.
    if greedy_tokens is not None and not greedy:
        raise UsageError("--greedy-tokens means nothing without --greedy")
    if into_report and not (against or passkey or passkey_length or humaneval or names):
        raise UsageError("--into-report has nothing to write: give --against, --passkey, --humaneval or --tasks")
    if into_report and cache_dtype is not None:
        raise UsageError("--into-report is for MODEL as it is: leave out --cache-dtype, or `quantize` it first")
    # Before hours of measuring.
    folder = check_target(model) if into_report else None

    from mla_convert.core.console import Terminal
    from mla_convert.core.progress import Progress
    from mla_convert.evaluate.quality.evaluation import Evaluation, evaluate_model
    from mla_convert.evaluate.quality.probes import GREEDY_TOKENS, ProbeSettings
    from mla_convert.pipeline.quantise import in_format
    from mla_convert.report.tables import print_evaluation

    probes = ProbeSettings(passkey=passkey or passkey_length is not None, passkey_length=passkey_length, greedy=greedy,
                    greedy_tokens=GREEDY_TOKENS if greedy_tokens is None else greedy_tokens,
                    humaneval=humaneval, tasks=names, task_limit=task_limit)  # fmt: skip
    progress = Progress(quiet=quiet, verbose=is_verbose())

    def measure() -> Evaluation:
        named: AbstractContextManager[Path | str] = nullcontext(model)
        if cache_dtype is not None:
            named = in_format(Path(model), cache_dtype, device, progress)
        with named as place:
            return evaluate_model(str(place), against, text=text, windows=eval_windows, length=eval_length,
                                  suite_windows=suite_windows, dtype=dtype, device=device, probes=probes,
                                  original_cache=formats, progress=progress)  # fmt: skip

    evaluation = run_guarded(measure, OUT_OF_MEMORY)
    if folder:
        write_into_report(folder, evaluation.probes, evaluation.original_cache)
    if json_:
        say(json.dumps(evaluation.as_dict(), indent=2))
    else:
        console = Terminal()
        print_evaluation(evaluation, console)
        print_location(model, evaluation.model, console)


def _formats(given: list[str] | None, against: str | None) -> list[str]:
    """The formats of `--original-cache`, checked before seconds of importing torch."""
    if not given:
        return []
    if not against:
        raise UsageError("--original-cache quantises the cache of an original: give --against")
    try:
        return format_names(given)
    except ValueError as error:
        raise UsageError(f"--original-cache: {error}") from error
