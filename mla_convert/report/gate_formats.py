"""A gate's verdict on a terminal, as JUnit XML, as a Markdown table, and as GitHub's workflow commands. Imports no torch."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from rich.table import Table
from rich.text import Text

from mla_convert.core.words import shown
from mla_convert.evaluate.gate import Verdict


def table(verdict: Verdict) -> Table:
    """The checks as a table for a terminal, coloured by outcome."""
    lines = Table(title=Text(shown(f"gate: {verdict.model}")), title_justify="left")
    lines.add_column("check")
    lines.add_column("figure", justify="right")
    lines.add_column("limit", justify="right")
    lines.add_column("")
    for result in verdict.results:
        outcome = Text("pass", "green") if result.passed else Text("FAIL", "red")
        lines.add_row(Text(shown(result.name)), result.figure_text, result.limit_text, outcome)
    return lines


def reasons(verdict: Verdict) -> list[str]:
    """Why checks failed, a line each, and where the values come from."""
    failed = [f"{result.name}: {result.reason}" for result in verdict.results if not result.passed]
    return [*failed, f"figures {verdict.basis}"]


def junit_xml(verdict: Verdict, seconds: float) -> str:
    """The verdict as JUnit XML, with a test case for each gate.

    Args:
        verdict: all checks.
        seconds: time of the run.
    """
    failed = sum(not result.passed for result in verdict.results)
    counts = {"tests": str(len(verdict.results)), "failures": str(failed), "errors": "0", "time": f"{seconds:.3f}"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(f"mla-convert gate {verdict.model}"), **counts})
    properties = ElementTree.SubElement(suite, "properties")
    ElementTree.SubElement(properties, "property", {"name": "basis", "value": _xml(verdict.basis)})
    for result in verdict.results:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "mla_convert.gate", "name": result.name, "time": "0"}
        )
        if not result.passed:
            failure = ElementTree.SubElement(case, "failure", {"message": _xml(result.reason), "type": "GateFailed"})
            failure.text = _xml(f"{result.name}: {result.figure_text}, limit {result.limit_text}. {result.reason}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True).decode() + "\n"


def _xml(text: str) -> str:
    """Text with `?` for the control characters that XML 1.0 cannot hold."""
    return re.sub(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def markdown(verdict: Verdict) -> str:
    """The verdict as a Markdown table, for a job's summary."""
    lines = [f"### {'✅' if verdict.passed else '❌'} mla-convert gate: {_cell(verdict.model)}", "",
             "| check | figure | limit | result |", "|---|---:|---:|---|"]  # fmt: skip
    for result in verdict.results:
        outcome = "pass" if result.passed else f"**fail**: {_cell(result.reason)}"
        lines.append(f"| {result.name} | {result.figure_text} | {result.limit_text} | {outcome} |")
    return "\n".join([*lines, "", f"Figures {_cell(verdict.basis)}.", "", ""])


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table, on one line and with markup escaped."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def error_lines(verdict: Verdict) -> list[str]:
    """A workflow command for each failed gate, escaped as GitHub's toolkit does."""
    return [f"::error::{_escape(f'mla-convert gate, {verdict.model}: {result.name}: {result.reason}')}"
            for result in verdict.results if not result.passed]  # fmt: skip


def _escape(text: str) -> str:
    # The percent sign first, because the other replacements contain one.
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
