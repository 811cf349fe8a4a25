"""Rows of the quality beyond perplexity, as report.json holds it under `beyond`, for tables. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

from mla_convert.core.report_file import look_up

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


def ratio_words(evaluation: dict[str, Any]) -> str:
    """A perplexity ratio with its standard error over windows, if there is one: ×1.0110 ± 0.0012."""
    if evaluation["ratio"] is None:
        return "not finite"
    error = ratio_error(evaluation)
    return f"×{evaluation['ratio']:.4f}" + (f" ± {error:.4f}" if error else "")


def ratio_error(evaluation: dict[str, Any]) -> float | None:
    """Standard error of a perplexity ratio over windows, paired; None for a single window and in older reports."""
    ratio, error = evaluation.get("ratio"), evaluation.get("ratio_log_error")
    return ratio * error if ratio is not None and error is not None and math.isfinite(error) else None
