"""Reads the figures that report.json, or `eval --json`, holds. Imports no torch, so that a gate answers at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mla_convert.core.errors import InputError, one_line

REPORT = "report.json"
# `evaluation` of a conversion with --eval none.
NOT_EVALUATED = {"skipped": True, "text": None, "protocol": None, "before": None, "after": None, "ratio": None,
                 "ratio_log_error": None}  # fmt: skip


def read_report(path: Path) -> dict[str, Any]:
    """The content of a report.json, given by its own path or by its folder.

    Raises:
        InputError: it is not there or not a JSON object.
    """
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} not found: give a converted folder, or a report.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not readable JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a report: it holds no JSON object")
    return content


def calibration_words(calibration: dict[str, Any]) -> str:
    """What a model was calibrated on, from a report's `calibration`."""
    share = calibration.get("self_written") or 0
    return calibration["protocol"] + (f", {share:.0%} of them written by the original itself" if share else "")


def is_evaluated(evaluation: dict[str, Any]) -> bool:
    """Whether a report's `evaluation` holds figures: with --eval none it does not."""
    return not evaluation.get("skipped")


def find_report(folder: Path) -> dict[str, Any]:
    """The report of a folder, empty where there is none that can be read."""
    try:
        return read_report(folder)
    except InputError:
        return {}


def look_up(figures: Any, path: str) -> Any:
    """The entry at a dotted path (`evaluation.after.value`), or None where there is none."""
    for key in path.split("."):
        figures = figures.get(key) if isinstance(figures, dict) else None
    return figures


def finite(value: Any) -> Any:
    """JSON-like data with NaN and infinity as None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean(numbers: Iterable[int]) -> float:
    """Mean to one decimal, a whole number where it is one."""
    found = list(numbers)
    value = sum(found) / len(found)
    return int(value) if value == int(value) else round(value, 1)


PAGE = "report.html"
