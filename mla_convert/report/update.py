"""Quality beyond perplexity, as report.json holds it under `beyond`: in rows for tables, and into a report. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.report_file import REPORT, finite, is_evaluated, read_report
from mla_convert.core.words import expanded
from mla_convert.write.intact import check_intact


def check_target(model: str) -> Path:
    """The folder of a converted model whose report can be added to.

    Raises:
        UsageError: not a local folder.
        InputError: its report cannot be read or is not that of a conversion, or a file of it is damaged.
    """
    folder = expanded(model)
    if not folder.is_dir():
        raise UsageError(f"--into-report needs the folder of a converted model, and {model} is none")
    if not isinstance(read_report(folder).get("checksums"), dict):
        raise InputError(f"{folder / REPORT} has no checksums: not that of a finished conversion")
    check_intact(folder)  # what is changed in a damaged folder would look right afterwards
    return folder


def write_into_report(folder: Path, found: dict[str, Any]) -> None:
    """Add what was found to report.json under `beyond`, and make the page and the model card again.

    An earlier measurement of the same kind is replaced, others stay.

    Raises:
        InputError: a report that cannot be read, or that no page can be made of.
    """
    from mla_convert.core.report_file import PAGE
    from mla_convert.report.html.page import page_text
    from mla_convert.report.model_card import CARD, card_text
    from mla_convert.write.revise import replace_files

    content = read_report(folder)
    content["beyond"] = {**(content.get("beyond") or {}), **finite(found)}
    html = page_text(content)  # refuses a report that is not whole
    try:
        report = to_report(content)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{folder / REPORT} is not that of a conversion ({error})") from error
    made = {PAGE: html, CARD: card_text(report), REPORT: json.dumps(content, indent=2) + "\n"}
    replace_files(folder, made)


def to_report(content: dict[str, Any]) -> Any:
    """The content of a report.json as the Report that it was."""
    from mla_convert.report.report import Report

    known = {field.name for field in fields(Report)} - {"out"}
    report = Report(**{key: value for key, value in content.items() if key in known})
    report.evaluation = _numbers(report.evaluation)
    return report


def _numbers(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An evaluation with its figures as numbers again: JSON has null for those that are not finite."""
    if not is_evaluated(evaluation):
        return evaluation
    found = {**evaluation, "ratio": math.nan if evaluation["ratio"] is None else evaluation["ratio"]}
    for side in ("before", "after"):
        value = evaluation[side]["value"]
        found[side] = {**evaluation[side], "value": math.nan if value is None else value}
    return found
