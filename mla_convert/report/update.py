"""Quality beyond perplexity, as report.json holds it under `beyond`: in rows for tables, and into a report. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.report_file import REPORT, finite, is_evaluated, look_up, read_report
from mla_convert.core.words import expanded
from mla_convert.write.intact import check_intact

Row = tuple[str, str, str]


def rows(beyond: dict[str, Any]) -> list[Row]:
    """Rows of (what, original, model). What compares the two has one figure, under the model."""
    found: list[Row] = []
    if part := beyond.get("next_token"):
        found.append(("KL divergence, nats", "", _value(part["kl"], 5)))
        found.append(("next-token agreement", "", _value(part["agreement"], 4)))
    return found + probe_rows(beyond)


def probe_rows(beyond: dict[str, Any]) -> list[Row]:
    """The rows of the probes alone: greedy continuations, pass keys (all depths of a length together) and tasks."""
    found: list[Row] = []
    if part := beyond.get("greedy"):
        found.append((f"greedy, same at first ({part['tokens']} tokens)", "", _value(part["prefix"], 3)))
        found.append((f"greedy, same to the end ({part['prompts']} prompts)", "", _value(part["exact"], 3)))
    for entry in look_up(beyond, "passkey.lengths") or []:
        for what, key, digits in (("pass key found", "match", 2), ("its log-probability", "log_probability", 2)):
            before, after = (_value(look_up(entry, f"{side}.{key}"), digits) for side in ("before", "after"))
            found.append((f"{what}, {entry['length']} tokens", before, after))
    for task, content in (look_up(beyond, "tasks.results") or {}).items():
        for metric, sides in content["metrics"].items():
            found.append((f"{task}, {metric}", _value(sides["before"], 4), _value(sides["after"], 4)))
    return found


def heal_rows(before: dict[str, Any], after: dict[str, Any]) -> list[Row]:
    """Rows of (what, not healed, healed), of two measurements with `evaluation` and `beyond` as in report.json."""
    sides = [before, after]
    found = [
        ("perplexity over the original's", *(f"×{_value(_ratio(look_up(side, 'evaluation')), 4)}" for side in sides))
    ]
    for what, key, form in (
        ("worst kind of text, over the original's", "worst.ratio", "×{}"),
        ("KL, mean over kinds", "kl.value", "{}"),
    ):
        values = [look_up(side, f"evaluation.suite.{key}") for side in sides]
        if any(value is not None for value in values):
            found.append((what, *(form.format(_number(value, 4)) for value in values)))
    for what, path, digits in (("KL divergence, nats", "kl", 5), ("next-token agreement", "agreement", 4)):
        found.append((what, *(_value(look_up(side, f"beyond.next_token.{path}"), digits) for side in sides)))
    entries = [look_up(side, "beyond.passkey.lengths") or [] for side in sides]
    for entry in zip(*entries, strict=False):
        for what, key, digits in (("pass key found", "match", 2), ("its log-probability", "log_probability", 2)):
            values = (_value(look_up(each, f"after.{key}"), digits) for each in entry)
            found.append((f"{what}, {entry[0]['length']} tokens", *values))
    return found


def _ratio(evaluation: dict[str, Any]) -> dict[str, Any]:
    ratio, error = evaluation["ratio"], evaluation.get("ratio_log_error")
    return {"value": ratio, "error": None if ratio is None or error is None else ratio * error}


def passkey_rows(beyond: dict[str, Any]) -> list[list[str]]:
    """Every length and depth: length, depth, share found by the original and the model, log-probability by both."""
    return [
        [f"{cell['length']:,}", f"{cell['depth']:.0%}",
         *(_number(look_up(cell, f"{side}.{key}"), 2) for key in ("match", "log_probability") for side in ("before", "after"))]
        for cell in look_up(beyond, "passkey.results") or []
    ]  # fmt: skip


def conditions(beyond: dict[str, Any]) -> list[str]:
    """What the figures were measured on, a sentence each."""
    found = []
    if part := beyond.get("next_token"):
        found.append(f"KL(original ‖ model) and next-token agreement: {part['text']}, {part['protocol']}.")
    if part := beyond.get("greedy"):
        found.append(
            f"Greedy continuations: {part['prompts']} prompts of {part['prompt_tokens']} tokens of {part['text']}, "
            f"up to {part['tokens']} tokens each; same at first is the share before the "
            f"first different token. ± is over prompts."
        )
    if part := beyond.get("passkey"):
        found.append(
            f"Pass key: five digits in filler text, {part['keys']} keys at each length and depth; log-probability in nats of "
            f"the whole key, {part['guessing']:.2f} for guessing evenly."
        )
    if part := beyond.get("tasks"):
        limit = f", at most {part['limit']} examples a task" if part["limit"] else ""
        found.append(f"Tasks: lm-evaluation-harness {part['harness']}{limit}.")
    return found


def _value(figure: dict[str, float | None] | None, digits: int) -> str:
    if not figure or figure["value"] is None:
        return "–"
    error = figure.get("error")
    spread = f" ± {error:.{digits}f}" if error is not None and math.isfinite(error) else ""
    return _number(figure["value"], digits) + spread


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


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
    from mla_convert.report.html.page import PAGE, page_text
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
