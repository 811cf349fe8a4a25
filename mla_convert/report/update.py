"""Adds quality probes and quantised caches of the original to the report of a finished conversion. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.report_file import PAGE, REPORT, read_content, read_report
from mla_convert.core.report_schema import OriginalCacheSection, ProbesSection
from mla_convert.core.words import expanded
from mla_convert.write.intact import check_intact


def check_target(model: str) -> Path:
    """The folder of a converted model to whose report probes can be added.

    Raises:
        UsageError: not a local folder.
        InputError: its report cannot be read or is not that of a conversion, or one of its files is damaged.
    """
    folder = expanded(model)
    if not folder.is_dir():
        raise UsageError(f"--into-report needs the folder of a converted model, and {model} is none")
    if not isinstance(read_content(folder).get("checksums"), dict):
        raise InputError(f"{folder / REPORT} has no checksums: not that of a finished conversion")
    check_intact(folder)  # files written into a damaged folder would get valid checksums
    return folder


def write_into_report(folder: Path, probes: ProbesSection, original_cache: OriginalCacheSection | None = None) -> None:
    """Add probes and the original's quantised caches to report.json, and make the page and the model card again.

    A probe of the same kind is replaced, and so are the quantised caches where any was measured; others stay, and so do entries
    of the report that somebody added.

    Raises:
        InputError: the report cannot be read, or is not that of a conversion.
    """
    from mla_convert.report.html.page import page_text
    from mla_convert.report.model_card import CARD, card_text
    from mla_convert.write.revise import replace_files

    report = read_report(folder)
    report.probes = (report.probes or ProbesSection()).updated(probes)
    if original_cache:
        report.original_cache = original_cache
    replace_files(folder, {PAGE: page_text(report), CARD: card_text(report), REPORT: report.text()})
