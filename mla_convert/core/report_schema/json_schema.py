"""The JSON schema of report.json, for those who read reports with other programs."""

from __future__ import annotations

import re

from mla_convert.core.report_schema.base import JsonObject, to_json
from mla_convert.core.report_schema.report import REPORT, Report

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ATTRIBUTE = re.compile(r"^    (\w+): (.+)$", re.MULTILINE)


def json_schema() -> JsonObject:
    """The schema; the description of every entry is that of the class's docstring."""
    schema = to_json(Report.model_json_schema(by_alias=True))
    del schema["properties"]["out"]
    for definition in (schema, *schema["$defs"].values()):
        _describe(definition)
    return {"$schema": DIALECT, **schema, "title": REPORT}


def _describe(definition: JsonObject) -> None:
    """Move the docstring's attributes to their properties; drop titles and defaults, which only repeat names and null."""
    summary, _, attributes = definition["description"].partition("\n\nAttributes:\n")
    definition["description"] = summary
    described = dict(ATTRIBUTE.findall(attributes))
    described["schema"] = described.pop("schema_version", None)
    for name, entry in definition["properties"].items():
        entry.pop("title", None)
        if entry.get("default") is None:
            entry.pop("default", None)
        if described.get(name):
            entry["description"] = described[name]
