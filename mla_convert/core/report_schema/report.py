"""report.json as a whole: its sections, its schema and its one writer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field, ValidationError

from mla_convert.core.errors import InputError
from mla_convert.core.files import write_file
from mla_convert.core.report_schema.base import Amount, JsonObject, Section, first_problem
from mla_convert.core.report_schema.conversion import (
    BenchSection,
    CacheSection,
    CalibrationSection,
    LayerEntry,
    PhaseEntry,
    SelfCheckSection,
    SourceSection,
    SweepEntry,
    Versions,
)
from mla_convert.core.report_schema.evaluation import (
    EarlierState,
    Evaluation,
    EvaluationSection,
    OriginalCacheSection,
)
from mla_convert.core.report_schema.heal import HealSection
from mla_convert.core.report_schema.probes import ProbesSection

REPORT = "report.json"
# 1: versions before 0.2, with `beyond` for `probes`. Both are read, and 2 is written.
SCHEMA = 2
# More than any model has. It bounds the page of a stranger's report, which has marks for every layer.
MOST_LAYERS = 4096
NOT_A_REPORT = "report.json is not that of a conversion"


class Report(Section):
    """Everything measured in one conversion.

    Attributes:
        source: the original.
        settings: of the conversion, with labels of texts for their paths.
        versions: of the packages that the conversion ran with.
        device: name of the device.
        cache: the KV cache before and after.
        evaluation: perplexity before and after.
        calibration: the calibration text.
        layers: one entry a layer.
        phases: time and memory by phase.
        seconds: time of the whole run.
        checksums: sha256 by shard.
        schema_version: `schema` in the file.
        notes: what a reader should know.
        original_cache: the original with quantised caches of its own, with `--original-cache`.
        earlier_states: what `heal` and `quantize` replaced, oldest first.
        probes: added by `eval --into-report`.
        heal: added by `heal`.
        self_check: the trial of the folder.
        sweep: added by `sweep`.
        bench: speed, where somebody added it.
        refreshed: versions of the packages of the last `refresh`.
        out: folder of the conversion; not in the file, which holds no paths.
    """

    source: SourceSection
    settings: JsonObject
    versions: Versions
    device: str
    cache: CacheSection
    evaluation: Evaluation
    calibration: CalibrationSection
    layers: Annotated[list[LayerEntry], Field(max_length=MOST_LAYERS)]
    phases: dict[str, PhaseEntry]
    seconds: Amount
    checksums: dict[str, str]
    schema_version: int = Field(SCHEMA, validation_alias="schema", serialization_alias="schema")
    notes: list[str] | None = None
    # `beyond` is the name in reports of schema 1.
    probes: ProbesSection | None = Field(
        None, validation_alias=AliasChoices("probes", "beyond"), serialization_alias="probes"
    )
    original_cache: OriginalCacheSection | None = None
    earlier_states: list[EarlierState] | None = None
    heal: HealSection | None = None
    self_check: SelfCheckSection | None = None
    sweep: list[SweepEntry] | None = None
    bench: BenchSection | None = None
    refreshed: Versions | None = None
    out: Path | None = None

    @property
    def measured(self) -> EvaluationSection | None:
        """The evaluation, or None where the conversion ran with `--eval none`."""
        return self.evaluation if isinstance(self.evaluation, EvaluationSection) else None

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity after conversion over the original's; None where it was not evaluated, NaN where it is not finite."""
        return self.measured.ratio if self.measured else None

    @property
    def ratio(self) -> float | None:
        """The name of version 0.1 for `perplexity_ratio`."""
        warnings.warn("Report.ratio is now Report.perplexity_ratio", DeprecationWarning, stacklevel=2)
        return self.perplexity_ratio

    def model_post_init(self, context: object) -> None:
        """Whatever was read, this version's schema is written."""
        self.schema_version = SCHEMA

    def entries(self) -> JsonObject:
        """Its entries by name in report.json."""
        return {name: value for name, value in super().entries().items() if name != "out"}

    def text(self) -> str:
        """The content of report.json.

        Raises:
            InputError: an entry that somebody added is nested too deeply.
        """
        try:
            return json.dumps(self.as_dict(), indent=2) + "\n"
        except RecursionError:
            raise InputError(f"{NOT_A_REPORT}: it is nested too deeply") from None

    def write(self, folder: Path) -> None:
        """Write report.json into a folder."""
        write_file(folder / REPORT, self.text())


def parse_report(content: object) -> Report:
    """The content of a report.json of any schema, every entry checked: a downloaded model's report may hold anything.

    Raises:
        InputError: names the first entry that is missing or of another kind.
    """
    if not isinstance(content, dict):
        raise InputError(f"{NOT_A_REPORT}: it should be an object")
    try:
        # `out` is where this process wrote the folder; a path in a file of somebody else must not be taken for that.
        return Report.model_validate({name: value for name, value in content.items() if name != "out"})
    except ValidationError as error:
        raise InputError(f"{NOT_A_REPORT}: {first_problem(error)}") from error
