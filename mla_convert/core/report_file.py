"""Reads report.json and other JSON files of its kind. Imports no torch, so that a gate answers at once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mla_convert.core.errors import InputError, one_line
from mla_convert.core.report_schema import REPORT, JsonObject, Report, Section, parse_report
from mla_convert.core.report_schema.base import OLD_NAMES

PAGE = "report.html"


def read_content(path: Path) -> JsonObject:
    """The content of a JSON file, given by its own path or, for report.json, by its folder; its entries are not checked.

    Raises:
        InputError: it is not there or not a JSON object.
    """
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} not found: give a converted folder, or a report.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    # json raises RecursionError where a file is nested deeply, as a damaged or hostile one may be.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not readable JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a report: it holds no JSON object")
    return content


def find_content(folder: Path) -> JsonObject:
    """The content of a folder's report.json, empty where there is none that can be read."""
    try:
        return read_content(folder)
    except InputError:
        return {}


def read_report(path: Path) -> Report:
    """The report of a conversion, of any schema, given by its own path or by its folder.

    Raises:
        InputError: it is not there, or an entry is missing or of another kind.
    """
    return parse_report(read_content(path))


def look_up(content: Any, path: str) -> Any:
    """The entry at a dotted path (`evaluation.after.value`), or None where there is none; names of schema 1 are found too."""
    for key in path.split("."):
        if isinstance(content, dict) and key not in content:
            key = NAMES.get(key, key)
        content = content.get(key) if isinstance(content, dict | Section) else None
    return content


# Old names by new, and new names by old: `beyond.…` is found in a new report, and `probes.…` in an old one.
NAMES = {**OLD_NAMES, **{new: old for old, new in OLD_NAMES.items()}}


def mean(numbers: Iterable[int]) -> float:
    """Mean to one decimal, a whole number where it is one."""
    values = list(numbers)
    value = sum(values) / len(values)
    return int(value) if value == int(value) else round(value, 1)
