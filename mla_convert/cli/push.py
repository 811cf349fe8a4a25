"""`mla-convert push`: upload a finished conversion to the Hub, after a gate if one is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mla_convert.cli.options import (
    HUB,
    MEASURE,
    Against,
    Baseline,
    Device,
    FromReport,
    MaxKl,
    MaxPerplexity,
    MaxRatio,
    MaxRegression,
    MaxWorst,
    MinAgreement,
    MinSaving,
    Private,
    Quiet,
    Text,
    Verbose,
)
from mla_convert.cli.terminal import silence_libraries
from mla_convert.cli.verdict import judge, print_verdict, read_limits, tell_github
from mla_convert.core.errors import GateFailed, UsageError
from mla_convert.core.words import say

EXAMPLE = "mla-convert push llama-8b-mla my-org/llama-8b-mla --private --min-kv-saving 70% --from-report"


Branch = Annotated[
    str | None,
    typer.Option(
        help="Branch to push to; created if it does not exist. Default: main.", rich_help_panel=HUB, show_default=False
    ),
]
PullRequest = Annotated[
    bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.", rich_help_panel=HUB)
]
Message = Annotated[
    str | None,
    typer.Option(help="Message of the commit. Default: the model's name, rank and rotary dims.", rich_help_panel=HUB),
]


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a converted model.", show_default=False)],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="owner/name; created if it does not exist.", show_default=False)
    ],
    private: Private = None,
    revision: Branch = None,
    create_pr: PullRequest = False,
    commit_message: Message = None,
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
    device: Device = "auto",
    json_: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=HUB)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check DIR byte for byte and upload it to REPO on the Hugging Face Hub, in one commit.

    With a limit, the gate comes first: if it fails (exit code 3), nothing is uploaded. The token is that of
    `hf auth login`, or HF_TOKEN.
    """
    limits = read_limits(
        max_ppl_ratio, max_ppl, min_kv_saving, baseline, max_regression, max_worst_ratio, max_kl, min_agreement
    )
    if not limits and (from_report or against or text):
        raise UsageError(f"the options under {MEASURE} are for a gate: give a limit, such as --max-ppl-ratio")
    silence_libraries(quiet)
    from mla_convert.core.progress import Progress
    from mla_convert.publish import hub
    from mla_convert.write.verify import verify

    # Before the gate measures for hours.
    hub.check_name(repo)
    progress = Progress(quiet=quiet)
    if limits:
        verify(folder)  # the uploaded folder must be the measured one
        verdict = judge(str(folder), limits, from_report, against, quiet, {"text": text, "device": device})
        print_verdict(verdict, to_stderr=json_)
        tell_github(verdict, to_stderr=json_)
        if not verdict.passed:
            raise GateFailed(f"nothing was pushed: {verdict.summary}")
    pushed = hub.push(folder, repo, private=private, revision=revision, create_pr=create_pr, message=commit_message,
                    progress=progress)  # fmt: skip
    if json_:
        say(json.dumps(pushed.as_dict(), indent=2))
    else:
        say(f"{len(pushed.files)} files are at {pushed.url}")
